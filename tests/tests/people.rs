//! What people do wrong, and what the administrator takes back.

use std::time::Duration;

use anyhow::{Result, ensure};
use tombolo_lab::topology::{TWO, Topology};
use tombolo_lab::{Lab, directory, scenario, wait_until};

const LIMIT: Duration = Duration::from_secs(240);
const SOON: Duration = Duration::from_secs(20);
const API: &str = "api-service.production.svc.clusterset.local";

fn up() -> Result<Lab> {
    let lab = Lab::build(Topology::parse(TWO)?)?;
    lab.bring_up()?;
    lab.export("eu-west", "production", "api-service")?;
    answers(&lab)?;
    Ok(lab)
}

fn answers(lab: &Lab) -> Result<()> {
    let url = format!("http://{API}:8080/health");
    wait_until("the name to answer", SOON, || lab.fetch("us-c", &url, &["--timeout", "2"]).map(drop))
        .map(drop)
}

/// A manifest that no longer parses keeps its last good meaning; other news still passes; mended, it counts again.
#[test]
fn bad_manifests_lose_nothing() {
    scenario("bad_manifests_lose_nothing", LIMIT, || {
        let lab = up()?;
        let manifests = lab.cluster_dir("eu-west").join("manifests");
        let service = "service-production-api-service.yaml";
        let good = std::fs::read_to_string(manifests.join(service))?;
        for bad in ["{", "kind: [", "apiVersion: v1\nkind: Service\nmetadata: 7\n", "\0\0\0"] {
            directory::put(&manifests, service, bad)?;
            directory::put(&manifests, "export-production-api-service.yaml", bad)?;
            // News that comes after the bad ones: when it has arrived, they have been read.
            lab.export("eu-west", "production", "db")?;
            let db = "db.production.svc.clusterset.local";
            wait_until("later news", SOON, || {
                ensure!(!lab.ask("us-c", db, 1)?.1.is_empty(), "{db} is not known yet");
                Ok(())
            })?;
            lab.fetch("us-c", &format!("http://{API}:8080/health"), &[])?;
            lab.unexport("eu-west", "production", "db")?;
            wait_until("later news", SOON, || {
                ensure!(lab.ask("us-c", db, 1)?.0 == 3, "{db} is still known");
                Ok(())
            })?;
            lab.fetch("us-c", &format!("http://{API}:8080/health"), &[])?;
        }
        directory::put(&manifests, service, &good)?;
        lab.export("eu-west", "production", "api-service")?;
        answers(&lab)?;
        lab.unexport("eu-west", "production", "api-service")?;
        wait_until("the export to be taken back", SOON, || {
            ensure!(lab.ask("us-c", API, 1)?.0 == 3, "{API} is still known");
            Ok(())
        })?;
        Ok(())
    });
}

/// Revoked: its names, routes and peers go everywhere, and nothing passes any more.
#[test]
fn a_revoked_cluster_is_out() {
    scenario("a_revoked_cluster_is_out", LIMIT, || {
        let lab = up()?;
        lab.revoke("eu-west")?;
        wait_until("the name to go", SOON, || {
            ensure!(lab.ask("us-c", API, 1)?.0 == 3, "{API} is still known");
            Ok(())
        })?;
        for node in &lab.topology().cluster("us-east")?.nodes {
            let place = lab.place(&node.name)?;
            wait_until("its routes to go", SOON, || {
                let routes = place.capture(&["ip", "route", "show", "table", "4510"])?;
                ensure!(!routes.contains("10.1.0.0/16"), "{} still has\n{routes}", node.name);
                Ok(())
            })?;
        }
        Ok(())
    });
}
