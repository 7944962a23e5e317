//! Where the programs of Kubernetes are.

use std::path::PathBuf;

use anyhow::{Context, Result};

/// A Go module of tests/kube/: its directory, what it is about, its go.mod, and the programs built from it.
struct Module {
    name: &'static str,
    path: &'static str,
    go_mod: &'static str,
    programs: &'static [&'static str],
}

const MODULES: [Module; 6] = [
    Module {
        name: "etcd",
        path: "go.etcd.io/etcd/server/v3",
        go_mod: include_str!("../../kube/etcd/go.mod"),
        programs: &["etcd"],
    },
    Module {
        name: "kubernetes",
        path: "k8s.io/kubernetes",
        go_mod: include_str!("../../kube/kubernetes/go.mod"),
        programs: &["kube-apiserver", "kubectl", "kube-controller-manager", "kube-scheduler", "kube-proxy"],
    },
    Module {
        name: "coredns",
        path: "github.com/coredns/coredns",
        go_mod: include_str!("../../kube/coredns/go.mod"),
        programs: &["coredns"],
    },
    Module {
        name: "kwok",
        path: "sigs.k8s.io/kwok",
        go_mod: include_str!("../../kube/kwok/go.mod"),
        programs: &["kwok"],
    },
    Module {
        name: "kubelet",
        path: "k8s.io/kubelet",
        go_mod: include_str!("../../kube/kubelet/go.mod"),
        programs: &["kubelet"],
    },
    Module {
        name: "conformance",
        path: "sigs.k8s.io/mcs-api",
        go_mod: include_str!("../../kube/conformance/go.mod"),
        programs: &["conformance"],
    },
];

impl Module {
    /// The version at which the go.mod requires what it is about.
    fn version(&self) -> Option<&'static str> {
        self.go_mod.lines().find_map(|line| {
            let line = line.trim().strip_prefix("require ").unwrap_or(line).trim();
            line.strip_prefix(self.path)?.split_whitespace().next().filter(|v| v.starts_with('v'))
        })
    }
}

/// The path of a program of Kubernetes: in `KUBEBUILDER_ASSETS`, as users of envtest have it, else where `.ci/kube`
/// put it.
///
/// # Errors
/// If it is in neither: says how to get it.
pub fn find(program: &str) -> Result<String> {
    let module = MODULES.iter().find(|m| m.programs.contains(&program));
    let module =
        module.with_context(|| format!("{program} is no program of Kubernetes that the lab knows"))?;
    let version = module
        .version()
        .with_context(|| format!("tests/kube/{}/go.mod does not require {}", module.name, module.path))?;
    let assets = std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
    let cache = std::env::var_os("TOMBOLO_CACHE").map(PathBuf::from).or_else(|| {
        let home = std::env::var_os("HOME").map(PathBuf::from)?;
        Some(home.join(".cache/tombolo"))
    });
    // `.ci/kube` builds a suite of another version there.
    let version = if program == "conformance" && std::env::var_os("TOMBOLO_CONFORMANCE").is_some() {
        "checkout"
    } else {
        version
    };
    let built = cache.map(|cache| cache.join(format!("{}-{version}", module.name)));
    let found =
        [assets, built].into_iter().flatten().map(|dir| dir.join(program)).find(|file| file.is_file());
    let found = found.with_context(|| {
        format!("{program} {version} is not there: run .ci/kube, which builds it (needs Go, once 10 to 30 minutes)")
    })?;
    Ok(found.to_string_lossy().into_owned())
}

/// Why clusters of `api: kubernetes` cannot be made here, if so.
#[must_use]
pub fn missing() -> Option<String> {
    let needed = MODULES.iter().flat_map(|m| m.programs);
    needed.map(|program| find(program)).find_map(Result::err).map(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_module_says_which_version_it_builds() {
        for module in &MODULES {
            assert!(module.version().is_some_and(|v| v.split('.').count() >= 3), "{}", module.name);
        }
        assert_eq!(MODULES[1].version().map(|v| &v[..5]), Some("v1.35"));
    }
}
