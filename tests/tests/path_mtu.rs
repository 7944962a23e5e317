//! A network between two clusters that begins to carry less and says so to nobody.
#![allow(clippy::print_stderr)]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tombolo_lab::fault::Fault;
use tombolo_lab::fetch::{Family, fetch};
use tombolo_lab::scorecard::collecting;
use tombolo_lab::serve::ECHO_PORT;
use tombolo_lab::topology::{TWO, Topology};
use tombolo_lab::{Lab, host, measured, runs, scenario_alone, strict, wait_until};

const LIMIT: Duration = Duration::from_secs(300);
const SOON: Duration = Duration::from_secs(20);
/// Of what is fetched, and of what an old connection sends and gets back.
const BYTES: usize = 300_000;
const FROM: &str = "us-c";
const TO: &str = "eu-c";

fn addresses(lab: &Lab) -> Result<[IpAddr; 2]> {
    let pod = lab.topology().pod(TO)?;
    Ok([pod.v4.into(), pod.v6.into()])
}

/// A new connection brings all of it.
fn bulk(lab: &Lab, to: IpAddr, within: Duration) -> Result<()> {
    let url = format!("http://{}:8080/bytes/{BYTES}", host(to));
    let got = lab.place(FROM)?.run(move || fetch(&url, Family::Any, within))??;
    ensure!(got.body.len() == BYTES, "{} of {BYTES} bytes from {to}", got.body.len());
    Ok(())
}

/// A connection that carries as much both ways, again and again.
struct Old(TcpStream);

impl Old {
    fn open(lab: &Lab, to: IpAddr) -> Result<Self> {
        let to = SocketAddr::new(to, ECHO_PORT);
        let stream = lab.place(FROM)?.run(move || TcpStream::connect_timeout(&to, SOON))??;
        stream.set_nodelay(true)?;
        Ok(Self(stream))
    }

    fn bulk(&mut self, within: Duration) -> Result<Duration> {
        let start = Instant::now();
        self.0.set_read_timeout(Some(within))?;
        self.0.set_write_timeout(Some(within))?;
        let mut writer = self.0.try_clone()?;
        let writing = std::thread::spawn(move || writer.write_all(&vec![b'x'; BYTES]));
        let mut back = vec![0; BYTES];
        self.0.read_exact(&mut back).context("an old connection does not go on")?;
        writing.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        Ok(start.elapsed())
    }
}

/// What a too long packet gets for an answer.
fn told(lab: &Lab, to: IpAddr, size: u16) -> Result<String> {
    let size = size.to_string();
    let output =
        lab.place(FROM)?.output(&["ping", "-c", "1", "-W", "2", "-M", "do", "-s", &size, &to.to_string()])?;
    Ok(format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
}

/// Routes to other clusters that bear an MTU, on a node.
fn narrow(lab: &Lab, node: &str) -> Result<String> {
    let place = lab.place(node)?;
    let v4 = place.capture(&["ip", "route", "show", "table", "4510"])?;
    let v6 = place.capture(&["ip", "-6", "route", "show", "table", "4510"])?;
    Ok(v4.lines().chain(v6.lines()).filter(|line| line.contains(" mtu ")).collect::<Vec<_>>().join("\n"))
}

#[test]
fn a_path_that_narrows_is_usable_again() {
    scenario_alone("a_path_that_narrows_is_usable_again", LIMIT, || {
        let lab =
            Lab::build(Topology::parse(&TWO.replace("    pod_cidrs", "    reach: all\n    pod_cidrs"))?)?;
        lab.bring_up()?;
        wait_until("tunnels", SOON, || lab.everybody_reaches_everybody())?;
        for _ in 0..runs(1) {
            narrows(&lab)?;
        }
        Ok(())
    });
}

fn narrows(lab: &Lab) -> Result<()> {
    let [v4, v6] = addresses(lab)?;
    let mut old = Vec::new();
    for to in [v4, v6] {
        bulk(lab, to, SOON)?;
        let mut connection = Old::open(lab, to)?;
        connection.bulk(SOON)?;
        old.push((to, connection));
    }
    for gateway in ["eu-gw1", "us-gw1"] {
        let narrow = narrow(lab, gateway)?;
        ensure!(narrow.is_empty(), "{gateway}: {narrow}");
    }

    // To what IPv6 can still work with, and to less: there its old connections cannot be told.
    old = narrowed(lab, old, 1400)?;
    lab.heal()?;
    old.retain(|(to, _)| to.is_ipv4());
    old = narrowed(lab, old, 1300)?;

    // Whoever sends too much is told, by the tunnel's own end.
    wait_until("an ICMP error for a long packet", SOON, || {
        for (to, mtu) in [(v4, "1240"), (v6, "1280")] {
            // More than these, and less than what was told before.
            let text = told(lab, to, 1250)?;
            let told =
                ["mtu=", "mtu = ", "mtu: "].iter().any(|words| text.contains(&format!("{words}{mtu}")));
            ensure!(told, "{to}: {text}");
        }
        Ok(())
    })?;
    for node in ["eu-gw1", "eu-gw2", "us-gw1", "us-gw2"] {
        eprintln!("{node}:\n{}", narrow(lab, node)?);
    }
    let text = lab.tombolo("us-gw1", &["explain", &format!("{v4}:8080")])?;
    ensure!(text.contains("the path carries no more"), "{text}");

    lab.heal()?;
    if !strict() && !collecting() {
        return Ok(());
    }
    // It is tried once a minute.
    let took = wait_until("the whole path to be used again", Duration::from_secs(90), || {
        for node in ["eu-gw1", "eu-gw2", "us-gw1", "us-gw2"] {
            let narrow = narrow(lab, node)?;
            ensure!(narrow.is_empty(), "{node}: {narrow}");
        }
        Ok(())
    })?;
    measured("path-widens", took.as_secs_f64() * 1000.0, "ms")?;
    old.iter_mut().try_for_each(|(_, connection)| connection.bulk(SOON).map(drop))
}

/// The network carries so much: usable again by new connections, in both families; and the old ones go on.
fn narrowed(lab: &Lab, old: Vec<(IpAddr, Old)>, bytes: u16) -> Result<Vec<(IpAddr, Old)>> {
    lab.fault(Fault::Mtu { a: "eu-west".into(), b: "us-east".into(), bytes })?;
    let start = Instant::now();
    let go = |(to, mut connection): (IpAddr, Old)| {
        std::thread::spawn(move || {
            let took = connection.bulk(Duration::from_secs(60)).with_context(|| to.to_string())?;
            anyhow::Ok((to, connection, took))
        })
    };
    let going: Vec<_> = old.into_iter().map(go).collect();
    let mut waiting = addresses(lab)?.to_vec();
    wait_until("the path to be usable again", Duration::from_secs(60), || {
        while let Some(to) = waiting.last() {
            bulk(lab, *to, Duration::from_secs(1))?;
            waiting.pop();
        }
        Ok(())
    })?;
    measured("path-narrows", start.elapsed().as_secs_f64() * 1000.0, "ms")?;
    let mut old = Vec::new();
    for thread in going {
        let (to, connection, took) =
            thread.join().map_err(|_| anyhow::anyhow!("a connection panicked"))??;
        eprintln!("an old connection to {to} went on at {bytes}: {BYTES} bytes each way took {took:.1?}");
        old.push((to, connection));
    }
    Ok(old)
}
