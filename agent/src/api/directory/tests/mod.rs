//! Tests of the directory as a whole.

mod manifest;
mod rotate;
mod watching;
mod write;

use std::path::Path;

use tempfile::TempDir;
use tombolo_agent_core::object::ServiceKey;

use super::*;

/// A new directory; the first is to be kept until the end.
fn directory() -> (TempDir, Directory) {
    let temporary = TempDir::new().unwrap();
    let directory = Directory::create(temporary.path().join("cluster")).unwrap();
    (temporary, directory)
}

fn put(directory: &Directory, file: &str, text: impl AsRef<[u8]>) {
    let path = directory.root().join(MANIFESTS).join(file);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn remove(directory: &Directory, file: &str) {
    std::fs::remove_file(directory.root().join(MANIFESTS).join(file)).unwrap();
}

fn key(text: &str) -> ServiceKey {
    let (namespace, name) = text.split_once('/').unwrap();
    kind::service::key(Some(namespace), Some(name)).unwrap()
}

fn service(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: production\nspec:\n  ports:\n  - port: 80\n"
    )
}

fn export(name: &str) -> String {
    format!(
        "apiVersion: multicluster.x-k8s.io/v1beta1\nkind: ServiceExport\nmetadata:\n  name: {name}\n  namespace: production\n"
    )
}

fn names(observed: &Observed) -> Vec<String> {
    observed.services.get().into_iter().flatten().map(|(key, _)| key.name.to_string()).collect()
}

/// Inode and time of every file below a directory: equal only if nothing was written.
fn snapshot(top: &Path) -> BTreeMap<String, String> {
    let listing = tree::list(top, &[".json"], usize::MAX).unwrap();
    listing.files.into_iter().map(|(path, stamp)| (path, format!("{stamp:?}"))).collect()
}
