//! The lab's real Kubernetes by itself, and Tombolo on it.
#![allow(clippy::print_stdout)]

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tombolo_lab::kubernetes::{SYSTEM, conformance, find};
use tombolo_lab::place::words;
use tombolo_lab::topology::{KUBERNETES, Proxy};
use tombolo_lab::{Lab, Topology, host, scenario_kubernetes, strict, wait_until};

const SOON: Duration = Duration::from_secs(20);

/// What a Service of a lab cluster has for addresses.
fn addresses(lab: &Lab, cluster: &str, service: &str) -> Result<Vec<IpAddr>> {
    let path = "jsonpath={.spec.clusterIPs}";
    let text = lab.kubectl(cluster, &["get", "service", service, "-n", "production", "-o", path], "")?;
    let texts: Vec<String> = serde_json::from_str(&text).with_context(|| text.clone())?;
    texts.iter().map(|a| a.parse().with_context(|| a.clone())).collect()
}

/// The backends that answered so many requests.
fn answering(lab: &Lab, place: &str, url: &str, times: usize) -> Result<BTreeSet<String>> {
    let mut seen = BTreeSet::new();
    for _ in 0..times {
        let answer = lab.fetch(place, url, &["--timeout", "2"])?;
        ensure!(answer.status == 200, "{url} from {place}: {answer:?}");
        seen.insert(answer.body.trim().to_owned());
    }
    Ok(seen)
}

/// The lab's own ground: real controllers make slices of the lab's pods, kube-proxy balances in both modes and both
/// families, CoreDNS names everything.
#[test]
fn two_real_clusters_balance_and_name_their_own_services() {
    scenario_kubernetes(
        "two_real_clusters_balance_and_name_their_own_services",
        Duration::from_secs(180),
        || {
            let lab = Lab::build(Topology::parse(KUBERNETES)?)?;
            for (cluster, node) in [("eu-west", "eu-w1"), ("us-east", "us-w1")] {
                let nodes = lab.kubectl(cluster, &["get", "nodes", "--no-headers"], "")?;
                let ready = nodes.lines().filter(|line| line.contains(" Ready ")).count();
                ensure!(ready == 2 && nodes.contains(node), "{cluster} has other nodes:\n{nodes}");
            }
            let wanted = |pods: &[&str]| pods.iter().map(|p| format!("ok {p}")).collect::<BTreeSet<_>>();
            for (cluster, pod, service, port, backends) in [
                ("eu-west", "eu-a", "api-service", 8080, wanted(&["eu-a", "eu-b"])),
                ("us-east", "us-b", "web", 80, wanted(&["us-a", "us-b"])),
            ] {
                let addresses = addresses(&lab, cluster, service)?;
                ensure!(addresses.len() == 2, "{service} of {cluster} has {addresses:?}");
                for address in addresses {
                    let url = format!("http://{}:{port}/health", host(address));
                    wait_until(&format!("both backends behind {url}"), SOON, || {
                        let seen = answering(&lab, pod, &url, 12)?;
                        ensure!(seen == backends, "{seen:?} answer");
                        Ok(())
                    })?;
                }
                let name = format!("http://{service}.production.svc.cluster.local:{port}/health");
                answering(&lab, pod, &name, 1)?;
            }
            // What the kubelet says of a pod is what decides.
            lab.set_ready("eu-b", false)?;
            let url = "http://api-service.production.svc.cluster.local:8080/health";
            wait_until("the pod that is not ready to be left out", SOON, || {
                let seen = answering(&lab, "eu-a", url, 12)?;
                ensure!(seen == wanted(&["eu-a"]), "{seen:?} answer");
                Ok(())
            })?;
            // A pod of a headless service has a name of its own.
            let own = answering(&lab, "eu-b", "http://eu-a.db.production.svc.cluster.local:8080/health", 1)?;
            ensure!(own == wanted(&["eu-a"]), "{own:?}");
            Ok(())
        },
    );
}

/// What the conformance suite stands on: pods that the scheduler places, reached at their own addresses, and programs
/// run in them.
#[test]
fn pods_of_kwok_answer_at_their_addresses_and_run_programs() {
    scenario_kubernetes(
        "pods_of_kwok_answer_at_their_addresses_and_run_programs",
        Duration::from_secs(180),
        || {
            let lab = Lab::build(conformance::topology(1, Proxy::Nftables)?)?;
            let kubectl = |words: &[&str]| lab.kubectl("eu-west", words, "");
            kubectl(&["create", "deployment", "hello", "--image=hello", "--replicas=2", "--port=42"])?;
            kubectl(&["expose", "deployment", "hello", "--port=42", "--name=hello"])?;
            kubectl(&["wait", "--for=condition=Available", "deployment/hello", "--timeout=30s"])?;
            let pods = kubectl(&["get", "pods", "-o", "jsonpath={.items[*].status.podIP}"])?;
            let pods: BTreeSet<_> = pods.split_whitespace().map(|ip| format!("pod ip {ip}")).collect();
            ensure!(pods.len() == 2, "{pods:?}");
            let ask =
                ["exec", "deploy/hello", "--", "sh", "-c", "echo hi | nc hello.default.svc.cluster.local 42"];
            let mut seen = BTreeSet::new();
            wait_until("both pods behind the Service", SOON, || {
                seen.insert(kubectl(&ask)?.trim().to_owned());
                ensure!(seen == pods, "{seen:?} answered, of {pods:?}");
                Ok(())
            })?;
            let name = ["exec", "deploy/hello", "--", "nslookup", "hello.default.svc.cluster.local"];
            let address = kubectl(&["get", "service", "hello", "-o", "jsonpath={.spec.clusterIP}"])?;
            let answer = kubectl(&name)?;
            ensure!(answer.contains(&address), "{address} is not in: {answer}");
            Ok(())
        },
    );
}

/// deploy/ is taken whole by a real API server.
#[test]
fn the_manifests_are_clean_under_a_server_side_dry_run() {
    scenario_kubernetes(
        "the_manifests_are_clean_under_a_server_side_dry_run",
        Duration::from_secs(120),
        || {
            let mut topology = Topology::parse(KUBERNETES)?;
            topology.clusters.truncate(1);
            let lab = Lab::build(topology)?;
            lab.install("eu-west")?;
            lab.dry_run("eu-west")
        },
    );
}

/// The whole purpose: a ServiceExport of one cluster, applied as anybody applies it, is a name in a pod of another.
#[test]
fn an_export_of_one_real_cluster_is_a_name_in_another() {
    scenario_kubernetes(
        "an_export_of_one_real_cluster_is_a_name_in_another",
        Duration::from_secs(300),
        || {
            let lab = Lab::build(Topology::parse(KUBERNETES)?)?;
            lab.bring_up()?;
            lab.export("eu-west", "production", "api-service")?;
            let name = "api-service.production.svc.clusterset.local";
            let url = format!("http://{name}:8080/health");
            for family in ["-4", "-6"] {
                wait_until(&format!("{url} {family}"), SOON, || {
                    let answer = lab.fetch("us-b", &url, &[family, "--timeout", "2"])?;
                    ensure!(answer.status == 200, "{answer:?}");
                    Ok(())
                })
                .with_context(|| tell(&lab, "us-east"))?;
            }
            // Both backends answer, and see who asks.
            let mut seen = BTreeSet::new();
            wait_until("both backends of the other cluster", SOON, || {
                seen.extend(answering(&lab, "us-b", &url, 4)?);
                ensure!(seen.len() == 2, "{seen:?} answer");
                Ok(())
            })?;
            let own = lab.topology().pod("us-b")?.v4.to_string();
            let source = lab.fetch("us-b", &format!("http://{name}:8080/ip"), &["-4"])?;
            ensure!(source.body.trim() == own, "{own} was seen as {}", source.body.trim());
            let import = ["get", "serviceimport", "api-service", "-n", "production", "-o"];
            let clusters = lab.kubectl(
                "us-east",
                &[&import[..], &["jsonpath={.status.clusters[*].cluster}"]].concat(),
                "",
            )?;
            ensure!(clusters == "eu-west", "the import is of {clusters:?}");
            lab.unexport("eu-west", "production", "api-service")?;
            wait_until("the import to go", SOON, || {
                let left = lab.kubectl(
                    "us-east",
                    &["get", "serviceimports,services", "-n", "production", "-o", "name"],
                    "",
                )?;
                ensure!(left.trim() == "service/web", "{left}");
                Ok(())
            })?;
            Ok(())
        },
    );
}

/// The addresses of the Service that carries an import.
fn clusterset_ips(lab: &Lab, cluster: &str, import: &str) -> Result<Vec<IpAddr>> {
    let path = "jsonpath={.spec.ips}";
    let words = ["get", "serviceimport", import, "-n", "production", "-o", path];
    let text = lab.kubectl(cluster, &words, "")?;
    let texts: Vec<String> = serde_json::from_str(&text).with_context(|| format!("{import}: {text:?}"))?;
    ensure!(texts.len() == 2, "{import} has {texts:?}");
    texts.iter().map(|a| a.parse().with_context(|| a.clone())).collect()
}

/// kube-proxy of every node leads to the other cluster's pods, as it leads to the own: both families, only exported
/// ports, affinity, and never to a Service of the same name that is not exported (mcs 2, 20, 28 to 30).
#[test]
fn through_its_clusterip_an_import_is_a_service_like_any_other() {
    scenario_kubernetes(
        "through_its_clusterip_an_import_is_a_service_like_any_other",
        Duration::from_secs(300),
        || {
            let lab = Lab::build(Topology::parse(KUBERNETES)?)?;
            lab.bring_up()?;
            let service = |name: &str, app: &str, more: serde_json::Value| {
                let mut spec = serde_json::json!({
                    "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
                    "selector": { "app": app }, "ports": [{ "name": "http", "port": 80, "targetPort": 8080 }],
                });
                for (key, value) in more.as_object().into_iter().flatten() {
                    spec[key] = value.clone();
                }
                serde_json::json!({
                    "apiVersion": "v1", "kind": "Service",
                    "metadata": { "name": name, "namespace": "production" }, "spec": spec,
                })
            };
            let none = serde_json::json!({});
            let sticky = serde_json::json!({ "sessionAffinity": "ClientIP" });
            lab.apply("eu-west", &[], &service("plain", "api", none.clone()))?;
            lab.apply("eu-west", &[], &service("sticky", "api", sticky))?;
            // Of the same name, and not exported.
            lab.apply("us-east", &[], &service("plain", "web", none))?;
            for name in ["plain", "sticky"] {
                lab.export("eu-west", "production", name)?;
            }
            let backends = BTreeSet::from(["ok eu-a".to_owned(), "ok eu-b".to_owned()]);
            for name in ["plain", "sticky"] {
                let mut ips = Vec::new();
                wait_until(&format!("addresses of {name}"), SOON, || {
                    ips = clusterset_ips(&lab, "us-east", name)?;
                    Ok(())
                })?;
                for pod in ["us-a", "us-b"] {
                    for ip in &ips {
                        let url = format!("http://{}/health", host(*ip));
                        wait_until(&format!("{url} of {name} from {pod}"), SOON, || {
                            answering(&lab, pod, &url, 1).map(drop)
                        })?;
                        // Once both backends are known to the node's proxy.
                        if name == "plain" {
                            wait_until(&format!("both backends behind {url}"), SOON, || {
                                let seen = answering(&lab, pod, &url, 10)?;
                                ensure!(seen == backends, "{seen:?} answer");
                                Ok(())
                            })?;
                        } else {
                            wait_until(&format!("one backend behind {url}"), SOON, || {
                                let seen = answering(&lab, pod, &url, 10)?;
                                ensure!(seen.len() == 1 && seen.is_subset(&backends), "{seen:?} answer");
                                Ok(())
                            })?;
                        }
                        // What the pods serve and the Service does not have.
                        let strict =
                            lab.fetch(pod, &format!("http://{}:8080/health", host(*ip)), &["--timeout", "1"]);
                        ensure!(strict.is_err(), "port 8080 of {name} answers {strict:?}");
                    }
                }
            }
            Ok(())
        },
    );
}

/// Whatever a user's objects are: each is told on its own ServiceExport, and nothing else is harmed.
#[test]
fn bad_objects_are_told_and_harm_nothing_else() {
    scenario_kubernetes("bad_objects_are_told_and_harm_nothing_else", Duration::from_secs(300), || {
        let lab = Lab::build(Topology::parse(KUBERNETES)?)?;
        lab.bring_up()?;
        lab.export("eu-west", "production", "api-service")?;
        let url = "http://api-service.production.svc.clusterset.local:8080/health";
        wait_until("the good service", SOON, || answering(&lab, "us-b", url, 1).map(drop))?;
        let words = ["get", "services", "-n", "production", "-l", "tombolo.dev/managed-by=tombolo.dev", "-o"];
        let mut derived = String::new();
        wait_until("the own cluster's Service of the import", SOON, || {
            let path = "jsonpath={.items[*].metadata.name}";
            derived = lab.kubectl("eu-west", &[&words[..], &[path]].concat(), "")?;
            ensure!(derived.starts_with("tombolo-") && !derived.contains(' '), "{derived:?}");
            Ok(())
        })?;
        let meta = |name: &str| serde_json::json!({ "name": name, "namespace": "production" });
        let service = |name: &str, spec: serde_json::Value| serde_json::json!({ "apiVersion": "v1", "kind": "Service", "metadata": meta(name), "spec": spec });
        let web = serde_json::json!([{ "name": "http", "port": 80 }]);
        let mut items = vec![
            service("outside", serde_json::json!({ "type": "ExternalName", "externalName": "example.org" })),
            service(
                "portless",
                serde_json::json!({
                    "selector": { "app": "api" }, "ports": [{ "name": "http", "port": 80, "targetPort": "nobody" }],
                }),
            ),
            service("labelled", serde_json::json!({ "selector": { "app": "api" }, "ports": web })),
            service("many", serde_json::json!({ "ports": web })),
        ];
        for part in 0..5 {
            let endpoints: Vec<_> = (0..1000)
                .map(|n| serde_json::json!({ "addresses": [format!("10.1.{}.{}", 100 + part * 4 + n / 250, n % 250)] }))
                .collect();
            let name = format!("many-{part}");
            items.push(serde_json::json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {
                    "name": name, "namespace": "production", "labels": { "kubernetes.io/service-name": "many" },
                },
                "addressType": "IPv4", "ports": [{ "name": "http", "port": 8080 }], "endpoints": endpoints,
            }));
        }
        for name in ["outside", "portless", "many", "missing", &derived] {
            items.push(serde_json::json!({
                "apiVersion": "multicluster.x-k8s.io/v1beta1", "kind": "ServiceExport", "metadata": meta(name),
            }));
        }
        items.push(serde_json::json!({
            "apiVersion": "multicluster.x-k8s.io/v1beta1", "kind": "ServiceExport", "metadata": meta("labelled"),
            "spec": { "exportedLabels": { "team": "blue", "-x/../y": "z", "bad": "$(reboot)" } },
        }));
        lab.apply(
            "eu-west",
            &[],
            &serde_json::json!({ "apiVersion": "v1", "kind": "List", "items": items }),
        )?;
        let condition = |name: &str, kind: &str| {
            let path = format!(
                "jsonpath={{range .status.conditions[?(@.type==\"{kind}\")]}}{{.status}} {{.reason}} {{.message}}{{end}}"
            );
            lab.kubectl("eu-west", &["get", "serviceexport", name, "-n", "production", "-o", &path], "")
        };
        for (name, kind, wanted) in [
            ("outside", "Valid", "False InvalidServiceType "),
            (&*derived, "Valid", "False InvalidServiceType "),
            ("missing", "Valid", "False NoService "),
            ("labelled", "Ready", "is left out"),
            ("labelled", "Valid", "True Valid "),
            ("portless", "Ready", "no backend serves any of its ports"),
            ("many", "Ready", "True Exported "),
        ] {
            wait_until(&format!("condition {kind} of {name}"), SOON, || {
                let told = condition(name, kind)?;
                ensure!(told.contains(wanted), "{told:?}");
                Ok(())
            })
            .with_context(|| tell(&lab, "eu-west"))?;
        }
        // All that can be used is.
        wait_until("5,000 backends in the other cluster", SOON * 2, || {
            let label = "multicluster.kubernetes.io/service-name=many";
            let path = "jsonpath={range .items[*]}{range .endpoints[*]}{.addresses[0]}{\"\\n\"}{end}{end}";
            let words = ["get", "endpointslices", "-n", "production", "-l", label, "-o", path];
            let there: BTreeSet<String> =
                lab.kubectl("us-east", &words, "")?.lines().map(str::to_owned).collect();
            ensure!(there.len() == 5000, "{} are there", there.len());
            Ok(())
        })?;
        let labels =
            ["get", "serviceimport", "labelled", "-n", "production", "-o", "jsonpath={.metadata.labels}"];
        let labels = lab.kubectl("us-east", &labels, "")?;
        ensure!(labels.contains("\"team\":\"blue\"") && !labels.contains("reboot"), "{labels}");
        let names = ["get", "serviceimports", "-n", "production", "-o", "jsonpath={.items[*].metadata.name}"];
        let names = lab.kubectl("us-east", &names, "")?;
        ensure!(
            !names.contains("outside") && !names.contains("missing") && !names.contains("tombolo-"),
            "{names}"
        );
        answering(&lab, "us-b", url, 5).map(drop)
    });
}

/// Another controller follows one that dies: nothing is lost or withdrawn, and the cluster speaks above what it said.
#[test]
fn a_killed_leader_is_followed_by_another() {
    scenario_kubernetes("a_killed_leader_is_followed_by_another", Duration::from_secs(300), || {
        let lab = Lab::build(Topology::parse(KUBERNETES)?)?;
        lab.bring_up()?;
        lab.export("eu-west", "production", "api-service")?;
        let url = "http://api-service.production.svc.clusterset.local:8080/health";
        wait_until("the name in the other cluster", SOON, || answering(&lab, "us-b", url, 1).map(drop))?;
        let lease = |path: &str| {
            let path = format!("jsonpath={{{path}}}");
            lab.kubectl("eu-west", &["get", "lease", "tombolo-controller", "-n", SYSTEM, "-o", &path], "")
        };
        // As the other cluster knows it: serial.generation.epoch.sequence.
        let position = || -> Result<Vec<u64>> {
            let words = ["get", "member", "eu-west", "-o", "jsonpath={.spec.position}"];
            let text = lab.kubectl("us-east", &words, "")?;
            let numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|part| !part.is_empty());
            numbers.map(|number| number.parse().with_context(|| text.clone())).collect()
        };
        let holder = lease(".spec.holderIdentity")?;
        let duration: u64 = lease(".spec.leaseDurationSeconds")?.parse()?;
        let before = position()?;
        let backend = lab.topology().pod("eu-a")?.v4;
        let flow = lab.udp_flow("us-b", backend.into(), 500)?;
        let victim = ["controller-eu-west-0", "controller-eu-west-1"]
            .into_iter()
            .find(|name| holder.contains(name))
            .with_context(|| format!("{holder} leads"))?;
        lab.kill_tree(victim, "controller")?;
        let within = Duration::from_secs(duration * 2);
        let took = wait_until("another leader", within, || {
            let now = lease(".spec.holderIdentity")?;
            ensure!(!now.is_empty() && now != holder, "{now} leads");
            Ok(())
        })?;
        println!("measured another leads after {took:.1?}, the Lease is good for {duration} s");
        lab.export("eu-west", "production", "db")?;
        wait_until("what is exported under the new leader", SOON, || {
            answering(&lab, "us-b", "http://db.production.svc.clusterset.local:8080/health", 1).map(drop)
        })
        .with_context(|| tell(&lab, "eu-west"))?;
        // Positions are written down at leisure.
        wait_until("its words to count above what was said", SOON * 2, || {
            let after = position()?;
            ensure!(after > before && after[2] > before[2], "spoke at {before:?}, and then at {after:?}");
            Ok(())
        })?;
        let report = flow.stop_udp()?;
        ensure!(report.lost == 0, "{} of {} packets lost", report.lost, report.sent);
        answering(&lab, "us-b", url, 5).map(drop)
    });
}

/// What a cluster's own objects say, for an error.
fn tell(lab: &Lab, cluster: &str) -> String {
    let objects = "serviceexports,serviceimports,services,endpointslices,tunnelnodes,members";
    let told = lab.kubectl(cluster, &["get", objects, "-A"], "");
    let agents = lab.topology().nodes().filter(|n| n.cluster == cluster).map(|n| lab.tail(&n.name, "agent"));
    let controllers = (0..2).map(|n| lab.tail(&format!("controller-{cluster}-{n}"), "controller"));
    let logs: Vec<_> = agents.chain(controllers).collect();
    format!("{}\n{}", told.unwrap_or_else(|error| format!("{error:#}")), logs.join("\n"))
}

/// RBAC and policies of deploy/ as the API server holds them against a node's own token.
#[test]
fn a_node_writes_only_its_own_tunnel_node() {
    scenario_kubernetes("a_node_writes_only_its_own_tunnel_node", Duration::from_secs(240), || {
        let lab = Lab::build(Topology::parse(KUBERNETES)?)?;
        lab.bring_up()?;
        let account = "/run/secrets/kubernetes.io/serviceaccount";
        let node = lab.place("eu-gw1")?;
        let token = node.capture(&["cat", &format!("{account}/token")])?;
        let (kubectl, authority) = (find("kubectl")?, format!("--certificate-authority={account}/ca.crt"));
        let token = format!("--token={}", token.trim());
        let as_node = |words: &[&str]| {
            let own = [
                &*kubectl,
                "--kubeconfig=/dev/null",
                "--server=https://10.96.0.1",
                "--cache-dir=/run/lab/state/cache",
            ];
            node.output(&[&own[..], &[&authority, &token], words].concat())
        };
        let patch = |name: &str| {
            let note = "{\"metadata\":{\"annotations\":{\"lab\":\"here\"}}}";
            as_node(&["patch", "tunnelnode", name, "--type=merge", "--patch", note])
        };
        let own = patch("eu-gw1")?;
        ensure!(own.status.success(), "{}", words(&own));
        for (what, output) in [
            ("another's TunnelNode", patch("eu-w1")?),
            ("the cluster's key", as_node(&["get", "secret", "tombolo-cluster-key", "-n", SYSTEM])?),
            ("an import", as_node(&["delete", "serviceimport", "any", "-n", "production"])?),
        ] {
            let said = words(&output);
            ensure!(!output.status.success() && said.contains("orbidden"), "{what}: {said}");
        }
        Ok(())
    });
}

/// While the API server hangs nothing is withdrawn and no packet lost; afterwards what came meanwhile is caught up.
#[test]
fn an_api_server_that_hangs_costs_nothing() {
    scenario_kubernetes("an_api_server_that_hangs_costs_nothing", Duration::from_secs(600), || {
        let lab = Lab::build(Topology::parse(KUBERNETES)?)?;
        lab.bring_up()?;
        lab.export("eu-west", "production", "api-service")?;
        let url = "http://api-service.production.svc.clusterset.local:8080/health";
        wait_until("the name in the other cluster", SOON, || answering(&lab, "us-b", url, 1).map(drop))?;
        let backend = lab.topology().pod("eu-a")?.v4;
        let flow = lab.udp_flow("us-b", backend.into(), 500)?;
        let away = Duration::from_secs(if strict() { 300 } else { 30 });
        lab.stop("api-us-east", "kube-apiserver")?;
        let start = Instant::now();
        while start.elapsed() < away {
            answering(&lab, "us-b", url, 1)
                .with_context(|| format!("{:?} into the outage", start.elapsed()))?;
        }
        let report = flow.stop_udp()?;
        ensure!(report.lost == 0, "{} of {} packets lost: {report:?}", report.lost, report.sent);
        // Said while nobody in us-east could hear it.
        lab.unexport("eu-west", "production", "api-service")?;
        lab.cont("api-us-east", "kube-apiserver")?;
        let caught = wait_until("what came meanwhile to be caught up", SOON, || {
            let left = lab.kubectl("us-east", &["get", "serviceimports", "-A", "-o", "name"], "")?;
            ensure!(left.trim().is_empty(), "{left}");
            Ok(())
        })?;
        ensure!(caught < Duration::from_secs(5) || !strict(), "caught up after {caught:?}");
        Ok(())
    });
}
