//! The set in the lab: brokers, membership, agents; and what people do with it.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::directory;
use crate::lab::{Lab, wait_until};
use crate::place::words;
use crate::program;

/// How long programs may take to be ready, on a slow and busy machine.
pub(crate) const READY: Duration = Duration::from_secs(60);

impl Lab {
    /// Everything: the set, its brokers, every cluster a member, an agent on every node, and all of it ready.
    ///
    /// # Errors
    /// What did not start, with its last words.
    pub fn bring_up(&self) -> Result<()> {
        self.found()?;
        for broker in &self.topology().brokers {
            self.start_broker(&broker.name)?;
        }
        for cluster in &self.topology().clusters {
            self.join(&cluster.id)?;
            self.start_agents(&cluster.id)?;
        }
        self.wait_ready()?;
        self.wait_acquainted()
    }

    /// Waits until every node routes the pod ranges of every other cluster: until then it cannot know that they are
    /// anybody's.
    ///
    /// # Errors
    /// Which node does not know which cluster.
    pub fn wait_acquainted(&self) -> Result<()> {
        for node in self.topology().nodes() {
            let place = self.place(&node.name)?;
            wait_until("clusters to know each other", READY, || {
                let mut routes = place.capture(&["ip", "route", "show", "table", "4510"])?;
                routes += &place.capture(&["ip", "-6", "route", "show", "table", "4510"])?;
                for cluster in self.topology().clusters.iter().filter(|c| c.id != node.cluster) {
                    for range in [cluster.pods4.to_string(), cluster.pods6.to_string()] {
                        let known = routes.contains(&format!("unreachable {range} "));
                        ensure!(known, "{} does not know {range} of {}", node.name, cluster.id);
                    }
                }
                Ok(())
            })
            .with_context(|| self.tail(&node.name, "agent"))?;
        }
        Ok(())
    }

    /// `tombolo init`: the lab is the administrator.
    ///
    /// # Errors
    /// What the command said.
    pub fn found(&self) -> Result<()> {
        run(self.admin(&program::init(self.topology())?)?, "").map(drop)
    }

    /// Gives a broker its identity and starts it.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start_broker(&self, name: &str) -> Result<()> {
        let index = self.topology().brokers.iter().position(|b| b.name == name);
        let index = index.with_context(|| format!("there is no broker {name}"))?;
        let state = self.state_dir(name);
        std::fs::copy(program::made_broker_key(index), state.join(program::BROKER_KEY))?;
        let set = Path::new(&program::set_dir()).join(program::BROKER_SET);
        std::fs::copy(set, state.join(program::BROKER_SET))?;
        self.start(name, "broker", &program::broker()?)
    }

    /// Invites a cluster and joins it with the token, on its first node.
    ///
    /// # Errors
    /// What a command said.
    pub fn join(&self, cluster: &str) -> Result<()> {
        let cluster = self.topology().cluster(cluster)?;
        let token = run(self.admin(&program::invite(cluster)?)?, "")?;
        if let Some(control) = cluster.kubernetes() {
            return self.join_kubernetes(cluster, control, &token);
        }
        let node = cluster.nodes.first().context("a cluster has nodes")?;
        run(self.command(&node.name, &program::join(cluster)?)?, &token).map(drop)
    }

    /// Starts the devices and the agent on each node of a cluster, and the controllers of one of `api: kubernetes`.
    ///
    /// # Errors
    /// If one does not start.
    pub fn start_agents(&self, cluster: &str) -> Result<()> {
        let cluster = self.topology().cluster(cluster)?;
        if let Some(control) = cluster.kubernetes() {
            return self.start_kubernetes_agents(cluster, control);
        }
        for node in &cluster.nodes {
            self.start(&node.name, "wireguard", &program::wireguard()?)?;
            self.start(&node.name, "agent", &program::agent(node)?)?;
        }
        Ok(())
    }

    /// Waits until every broker and agent says that it is ready.
    ///
    /// # Errors
    /// Which is not, why, and its last words.
    pub fn wait_ready(&self) -> Result<()> {
        for broker in &self.topology().brokers {
            self.ready(&broker.name, "broker", program::BROKER_ADMIN)?;
        }
        for cluster in &self.topology().clusters {
            for pod in cluster.kubernetes().into_iter().flat_map(|control| &control.controllers) {
                self.ready(&pod.name, "controller", program::AGENT_ADMIN)?;
            }
        }
        for node in self.topology().nodes() {
            self.ready(&node.name, "agent", program::AGENT_ADMIN)?;
        }
        Ok(())
    }

    fn ready(&self, place: &str, name: &str, admin: &str) -> Result<()> {
        let url = format!("http://{admin}/readyz?verbose");
        let look = || {
            self.pid(place, name)?;
            let answer = self.fetch(place, &url, &["--timeout", "2"])?;
            ensure!(answer.status == 200, "not ready: {}", answer.body.trim());
            Ok(())
        };
        wait_until(&format!("{name} of {place} to be ready"), READY, look)
            .map(drop)
            .with_context(|| self.tail(place, name))
    }

    /// Exports a service as people do: by a ServiceExport manifest in their cluster's directory, or by `kubectl apply`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn export(&self, cluster: &str, namespace: &str, service: &str) -> Result<()> {
        if self.topology().cluster(cluster)?.kubernetes().is_some() {
            let manifest = directory::export_manifest(namespace, service);
            return self.kubectl(cluster, &["apply", "--filename=-"], &manifest).map(drop);
        }
        let manifests = self.cluster_dir(cluster).join("manifests");
        directory::put(
            &manifests,
            &format!("export-{namespace}-{service}.yaml"),
            &directory::export_manifest(namespace, service),
        )
    }

    /// Takes an export back: removes its manifest, or by `kubectl delete`.
    ///
    /// # Errors
    /// If there is none.
    pub fn unexport(&self, cluster: &str, namespace: &str, service: &str) -> Result<()> {
        if self.topology().cluster(cluster)?.kubernetes().is_some() {
            let words = ["delete", "serviceexport", service, "--namespace", namespace];
            return self.kubectl(cluster, &words, "").map(drop);
        }
        let file =
            self.cluster_dir(cluster).join("manifests").join(format!("export-{namespace}-{service}.yaml"));
        std::fs::remove_file(&file).with_context(|| format!("removing {}", file.display()))
    }

    /// Runs `tombolo WORDS` on a node; what it printed.
    ///
    /// # Errors
    /// What the command said.
    pub fn tombolo(&self, node: &str, words: &[&str]) -> Result<String> {
        run(self.command(node, &program::tombolo(words)?)?, "")
    }

    /// Revokes a cluster's membership, as the administrator.
    ///
    /// # Errors
    /// What the command said.
    pub fn revoke(&self, cluster: &str) -> Result<()> {
        run(self.admin(&program::revoke(cluster)?)?, "").map(drop)
    }

    /// A command of the administrator's, who sits at the wire and so reaches the brokers.
    fn admin(&self, args: &[String]) -> Result<Command> {
        self.command("wire", args)
    }
}

/// Runs a command with this input; what it printed.
pub(crate) fn run(mut command: Command, input: &str) -> Result<String> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // Who does not read it says so by its exit code.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output: Output = child.wait_with_output()?;
    let line: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
    let line: Vec<_> = line.iter().map(|w| w.to_string_lossy()).collect();
    ensure!(output.status.success(), "{}: {}", line.join(" "), words(&output));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
