//! A cluster that was granted ranges and never spoke: nothing goes there in clear.

use anyhow::{Result, ensure};
use tombolo_lab::probe::Echo;
use tombolo_lab::{Lab, wait_until};

use crate::honest::{self, SOON};
use crate::mallory::{Mallory, PODS};

fn routes(lab: &Lab, node: &str) -> Result<String> {
    let place = lab.place(node)?;
    let mut routes = place.capture(&["ip", "route", "show", "table", "4510"])?;
    routes += &place.capture(&["ip", "-6", "route", "show", "table", "4510"])?;
    Ok(routes)
}

#[test]
fn a_member_that_never_spoke_is_unreachable_and_not_in_clear() {
    honest::story("silent::a_member_that_never_spoke_is_unreachable_and_not_in_clear", || {
        let lab = honest::up()?;
        let watch = lab.watch_wire()?;
        let mallory = Mallory::admitted(&lab, "mallory", &PODS, &["production"])?;
        // A session and no word.
        mallory.join();
        for node in lab.topology().nodes() {
            wait_until("its ranges to be known", SOON, || {
                let routes = routes(&lab, &node.name)?;
                for range in PODS {
                    ensure!(routes.contains(&format!("unreachable {range} ")), "{}: {routes}", node.name);
                }
                Ok(())
            })?;
        }
        for pod in ["eu-c", "us-c"] {
            let echo = lab.ping(pod, "10.66.1.1".parse()?, std::time::Duration::from_secs(1))?;
            ensure!(echo == Echo::Unreachable, "{pod}: {echo:?}");
        }
        watch.seen().assert_protected()?;
        // Over restarts of the controller too.
        honest::down(&lab, "eu-west")?;
        honest::again(&lab, "eu-west")?;
        lab.wait_ready()?;
        ensure!(routes(&lab, "eu-w1")?.contains("unreachable 10.66.0.0/16 "), "{}", routes(&lab, "eu-w1")?);
        // The administrator's word ends it.
        lab.revoke("mallory")?;
        for node in ["eu-w1", "us-w1"] {
            wait_until("its ranges to go", SOON, || {
                let routes = routes(&lab, node)?;
                ensure!(!routes.contains("10.66.0.0/16"), "{routes}");
                Ok(())
            })?;
        }
        honest::talk(&lab)
    });
}
