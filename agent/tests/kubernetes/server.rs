//! A real kube-apiserver and etcd on loopback.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, Config, ResourceExt as _};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpStream;

/// Whatever is waited for is there after so long on the slowest machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

/// A cluster of nothing but an API server. Both programs end with it.
pub(crate) struct Server {
    directory: TempDir,
    programs: Programs,
    arguments: &'static [&'static str],
    etcd: Running,
    api: Option<Running>,
    etcd_port: u16,
    port: u16,
}

#[derive(Clone)]
struct Programs {
    etcd: PathBuf,
    api: PathBuf,
    kubectl: PathBuf,
}

/// A connection to the API server without TLS, as the administrator.
pub(crate) struct Proxy {
    _kubectl: Running,
    pub(crate) stream: TcpStream,
}

/// A program that ends with us, also when we are killed: its keeper waits for the end of our pipe.
struct Running(Child);

/// Runs the rest of its arguments until its standard input ends, or the program does.
const KEEPER: &str = r#"exec 3<&0
"$@" 3<&- </dev/null & program=$!
(read -r _ <&3; kill -9 $program) 2>/dev/null & reader=$!
exec 3<&-
wait $program; status=$?
kill $reader 2>/dev/null
exit $status"#;

impl Running {
    fn command(program: &Path) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", KEEPER, "keeper"]).arg(program).stdin(Stdio::piped());
        command
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// Where programs of the tests lie: KUBEBUILDER_ASSETS, or what `.ci/kube` built.
fn program(name: &str) -> Option<PathBuf> {
    let assets = std::env::var_os("KUBEBUILDER_ASSETS").map(|dir| PathBuf::from(dir).join(name));
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/tombolo"));
    let cache = std::env::var_os("TOMBOLO_CACHE").map(PathBuf::from).or(home);
    let mut built: Vec<PathBuf> = cache
        .and_then(|cache| fs::read_dir(cache).ok())
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join(name))
        .collect();
    built.sort();
    assets.into_iter().chain(built.into_iter().rev()).find(|path| path.is_file())
}

impl Server {
    /// Starts one; None, loudly, where its programs are not: in CI that fails.
    pub(crate) async fn start() -> Option<Self> {
        Self::start_with(&[]).await
    }

    /// The same with more arguments of the API server.
    pub(crate) async fn start_with(arguments: &'static [&'static str]) -> Option<Self> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let found = |name| program(name);
        let (Some(etcd), Some(api), Some(kubectl)) =
            (found("etcd"), found("kube-apiserver"), found("kubectl"))
        else {
            let text =
                "etcd, kube-apiserver and kubectl are not here: run .ci/kube, or set KUBEBUILDER_ASSETS";
            assert!(std::env::var_os("CI").is_none(), "{text}");
            println!("NOT RUN: {text}");
            return None;
        };
        let programs = Programs { etcd, api, kubectl };
        let directory = tempfile::tempdir().unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        fs::write(directory.path().join("sa.key"), key.serialize_pem()).unwrap();
        fs::write(directory.path().join("sa.pub"), key.public_key_pem()).unwrap();
        let tokens = "admin,admin,admin,system:masters\nuser,user,user,users\n";
        fs::write(directory.path().join("tokens.csv"), tokens).unwrap();
        let (etcd_port, peer, port) = (free_port(), free_port(), free_port());
        let etcd = Running::command(&programs.etcd)
            .arg(format!("--data-dir={}", directory.path().join("etcd").display()))
            .arg(format!("--listen-client-urls=http://127.0.0.1:{etcd_port}"))
            .arg(format!("--advertise-client-urls=http://127.0.0.1:{etcd_port}"))
            .arg(format!("--listen-peer-urls=http://127.0.0.1:{peer}"))
            .arg(format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer}"))
            .arg(format!("--initial-cluster=default=http://127.0.0.1:{peer}"))
            .arg("--unsafe-no-fsync")
            .stdout(Stdio::null())
            .stderr(File::create(directory.path().join("etcd.log")).unwrap())
            .spawn()
            .unwrap();
        let mut server =
            Self { directory, programs, arguments, etcd: Running(etcd), api: None, etcd_port, port };
        server.start_api().await;
        Some(server)
    }

    /// Starts the API server again after [`Self::stop_api`].
    pub(crate) async fn start_api(&mut self) {
        let file = |name: &str| self.directory.path().join(name).display().to_string();
        let api = Running::command(&self.programs.api)
            .arg(format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port))
            .arg("--bind-address=127.0.0.1")
            .arg(format!("--secure-port={}", self.port))
            .arg(format!("--cert-dir={}", file("certificates")))
            .arg(format!("--service-account-key-file={}", file("sa.pub")))
            .arg(format!("--service-account-signing-key-file={}", file("sa.key")))
            .arg("--service-account-issuer=https://kubernetes.default.svc")
            .arg("--service-cluster-ip-range=10.96.0.0/16,fd00:96::/112")
            .arg("--authorization-mode=RBAC")
            .arg(format!("--token-auth-file={}", file("tokens.csv")))
            .args(self.arguments)
            .stdout(Stdio::null())
            .stderr(File::create(file("api.log")).unwrap())
            .spawn()
            .unwrap();
        self.api = Some(Running(api));
        let client = self.admin().await;
        let start = Instant::now();
        loop {
            // Roles and namespaces are made last.
            let namespace = get_opt(&client, "v1", "Namespace", "", "kube-system").await;
            let role = "rbac.authorization.k8s.io/v1";
            let role =
                get_opt(&client, role, "ClusterRole", "", "system:service-account-issuer-discovery").await;
            // Of a start before there are both; then it may yet know nothing of the kinds that were defined.
            if namespace.is_ok_and(|found| found.is_some())
                && role.is_ok_and(|found| found.is_some())
                && self.kubectl(&["get", "--raw=/readyz"]).is_ok()
            {
                return;
            }
            let log = fs::read_to_string(file("api.log")).unwrap_or_default();
            let ended = self.api.as_mut().unwrap().0.try_wait().unwrap();
            assert!(ended.is_none() && start.elapsed() < PATIENCE, "the API server is not ready: {log}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Kills the API server.
    pub(crate) fn stop_api(&mut self) {
        self.api = None;
    }

    /// A kubeconfig with a token.
    pub(crate) fn kubeconfig(&self, name: &str, token: &str) -> PathBuf {
        let path = self.directory.path().join(format!("{name}.kubeconfig"));
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{ "name": "test", "cluster": {
                "server": format!("https://127.0.0.1:{}", self.port),
                "insecure-skip-tls-verify": true,
            }}],
            "users": [{ "name": name, "user": { "token": token } }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": name } }],
        });
        fs::write(&path, config.to_string()).unwrap();
        path
    }

    /// The administrator's.
    pub(crate) fn admin_kubeconfig(&self) -> PathBuf {
        self.kubeconfig("admin", "admin")
    }

    /// The administrator's client.
    pub(crate) async fn admin(&self) -> Client {
        self.client(self.admin_kubeconfig()).await
    }

    /// The client of whoever a kubeconfig is of.
    pub(crate) async fn client(&self, kubeconfig: PathBuf) -> Client {
        let file = Kubeconfig::read_from(kubeconfig).unwrap();
        let options = KubeConfigOptions::default();
        let mut config = Config::from_custom_kubeconfig(file, &options).await.unwrap();
        // Who is sent away hears of it.
        config.default_retry = false;
        Client::try_from(config).unwrap()
    }

    /// Such a connection.
    pub(crate) async fn proxy(&self) -> Proxy {
        let port = free_port();
        let kubectl = Running::command(&self.programs.kubectl)
            .env("KUBECONFIG", self.admin_kubeconfig())
            .arg("proxy")
            .arg(format!("--port={port}"))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let kubectl = Running(kubectl);
        let start = Instant::now();
        loop {
            match TcpStream::connect(("127.0.0.1", port)).await {
                Ok(stream) => return Proxy { _kubectl: kubectl, stream },
                Err(error) => assert!(start.elapsed() < PATIENCE, "kubectl proxy does not answer: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Runs kubectl as the administrator; its output, if it succeeds.
    pub(crate) fn kubectl(&self, arguments: &[&str]) -> Result<String, String> {
        let output = Command::new(&self.programs.kubectl)
            .env("KUBECONFIG", self.admin_kubeconfig())
            .env("HOME", self.directory.path())
            .args(arguments)
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// Installs the kinds, the namespaces that tests use, and the rights of the user, who may do all there is.
    pub(crate) async fn install(&self) -> Client {
        let client = self.admin().await;
        self.kubectl(&["apply", "--server-side", "-k", deploy("crds").to_str().unwrap()]).unwrap();
        self.kubectl(&["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"]).unwrap();
        for namespace in ["tombolo-system", "shop"] {
            let object = json!({
                "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": namespace },
            });
            apply(&client, object).await;
        }
        let users = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
            "metadata": { "name": "users" },
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin",
            },
            "subjects": [{ "apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": "users" }],
        });
        apply(&client, users).await;
        client
    }

    /// Whether etcd lives.
    pub(crate) fn etcd_lives(&mut self) -> bool {
        self.etcd.0.try_wait().unwrap().is_none()
    }
}

/// A directory of deploy/.
pub(crate) fn deploy(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name)
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// The API of an object's kind and namespace.
pub(crate) fn api_of(client: &Client, object: &Value) -> Api<DynamicObject> {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let api_version = text("/apiVersion");
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let kind = text("/kind");
    let mut resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
    if kind == "MemberNodes" {
        resource.plural = "membernodes".to_owned();
    }
    match text("/metadata/namespace") {
        "" => Api::all_with(client.clone(), &resource),
        namespace => Api::namespaced_with(client.clone(), namespace, &resource),
    }
}

/// Makes an object so, as a user does.
pub(crate) async fn apply(client: &Client, object: Value) -> DynamicObject {
    let api = api_of(client, &object);
    let name = object["metadata"]["name"].as_str().unwrap().to_owned();
    let params = PatchParams::apply("somebody").force();
    let mut written = api.patch(&name, &params, &Patch::Apply(&object)).await.unwrap();
    if let Some(status) = object.get("status") {
        let body = json!({
            "apiVersion": object["apiVersion"], "kind": object["kind"],
            "metadata": { "name": name }, "status": status,
        });
        written = api.patch_status(&name, &params, &Patch::Apply(&body)).await.unwrap();
    }
    written
}

/// Reads an object as JSON.
pub(crate) async fn get(
    client: &Client,
    api_version: &str,
    kind: &str,
    namespace: &str,
    name: &str,
) -> Option<Value> {
    get_opt(client, api_version, kind, namespace, name).await.unwrap()
}

async fn get_opt(
    client: &Client,
    api_version: &str,
    kind: &str,
    namespace: &str,
    name: &str,
) -> Result<Option<Value>, kube::Error> {
    let object = json!({
        "apiVersion": api_version, "kind": kind, "metadata": { "namespace": namespace, "name": name },
    });
    let found = api_of(client, &object).get_opt(name).await?;
    Ok(found.map(|mut object| {
        object.managed_fields_mut().clear();
        serde_json::to_value(&object).unwrap()
    }))
}
