//! One measurement over one way that stands.

use std::process::{Child, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::way::Stand;
use super::{Figures, Options};

/// Payload of the UDP packets.
const UDP: u32 = 1200;
/// Lost packets that are still called none, of a hundred.
const LOSS: f64 = 0.5;
/// Steps of the search for what is carried without loss.
const STEPS: u32 = 6;

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Test {
    /// Echoes, nothing else.
    Ping,
    /// So many TCP streams.
    Tcp(u32),
    /// One TCP stream over IPv6.
    Tcp6,
    /// 64 TCP streams of small writes.
    Small,
    /// UDP packets of 1200 bytes without loss.
    Udp,
    /// Echoes while a TCP stream takes all.
    Loaded,
}

/// All.
const ALL: [Test; 7] =
    [Test::Ping, Test::Tcp(1), Test::Tcp(4), Test::Tcp6, Test::Small, Test::Udp, Test::Loaded];

impl FromStr for Test {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let test = ALL.into_iter().find(|test| test.name() == text);
        let names: Vec<_> = ALL.iter().map(Self::name).collect();
        test.ok_or_else(|| format!("one of {}", names.join(", ")))
    }
}

impl Test {
    /// All there are.
    #[must_use]
    pub fn all() -> Vec<Self> {
        ALL.to_vec()
    }

    fn name(&self) -> String {
        match self {
            Self::Ping => "ping".to_owned(),
            Self::Tcp(streams) => format!("tcp{streams}"),
            Self::Tcp6 => "tcp1-v6".to_owned(),
            Self::Small => "small64".to_owned(),
            Self::Udp => "udp".to_owned(),
            Self::Loaded => "loaded".to_owned(),
        }
    }

    /// Measures it, and writes down what came out.
    pub(super) fn run(&self, stand: &Stand, options: &Options, figures: &mut Figures) -> Result<()> {
        let name = self.name();
        let mut put = |what: &str, value: f64| figures.insert(format!("{name} {what}"), value);
        match self {
            Self::Ping => {
                let [p50, p99, lost] = ping(stand, 400, "0.003")?;
                put("p50 ms", p50);
                put("p99 ms", p99);
                put("lost %", lost);
            }
            Self::Loaded => {
                let seconds = 6;
                let mut load = start(stand, &["-t", &seconds.to_string()])?;
                std::thread::sleep(Duration::from_millis(700));
                let echoes = ping(stand, 300, "0.01");
                load.wait()?;
                let [p50, p99, lost] = echoes?;
                put("p50 ms", p50);
                put("p99 ms", p99);
                put("lost %", lost);
            }
            Self::Tcp(_) | Self::Tcp6 | Self::Small => {
                let streams = match self {
                    Self::Tcp(streams) => *streams,
                    Self::Small => 64,
                    _ => 1,
                }
                .to_string();
                let (seconds, v6) = (options.seconds.to_string(), *self == Self::Tcp6);
                let mut args = vec!["-t", &seconds, "-P", &streams];
                if *self == Self::Small {
                    args.extend(["-l", "512"]);
                }
                let before = stand.processor_seconds();
                let end = iperf(stand, &args, v6)?;
                let used = stand.processor_seconds() - before;
                let bytes = number(&end, "/sum_received/bytes")?;
                ensure!(bytes > 0.0, "nothing was carried");
                put("Gbit/s", number(&end, "/sum_received/bits_per_second")? / 1e9);
                if stand.has_processes() {
                    put("CPU s/GB", used / (bytes / 1e9));
                }
            }
            Self::Udp => {
                put("kpackets/s", udp(stand)? / 1000.0);
            }
        }
        Ok(())
    }
}

/// The most packets a second that arrive with at most [`LOSS`], by halving.
fn udp(stand: &Stand) -> Result<f64> {
    let once = |megabits: f64| -> Result<(f64, f64)> {
        let rate = if megabits > 0.0 { format!("{megabits:.0}M") } else { "0".to_owned() };
        let end = iperf(stand, &["-u", "-l", &UDP.to_string(), "-b", &rate, "-t", "1", "-w", "4M"], false)?;
        let (sent, lost) = (number(&end, "/sum/packets")?, number(&end, "/sum/lost_packets")?);
        let arrived = (sent - lost) / number(&end, "/sum/seconds")?;
        Ok((arrived, number(&end, "/sum/lost_percent")?))
    };
    let (flooded, _) = once(0.0)?;
    let (mut low, mut high, mut best) = (0.0, flooded * f64::from(UDP) * 8.0 / 1e6 * 1.15, 0.0);
    for _ in 0..STEPS {
        let middle = f64::midpoint(low, high);
        let (arrived, lost) = once(middle)?;
        if lost <= LOSS {
            (low, best) = (middle, arrived);
        } else {
            high = middle;
        }
    }
    Ok(best)
}

fn start(stand: &Stand, args: &[&str]) -> Result<Child> {
    let mut command = stand.command(0, "iperf3");
    command.args(["-c", &stand.target(false), "-p", "5201"]).args(args);
    Ok(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
}

/// One run of iperf3 between the ends; what it says of the whole. The server may need a moment after the last one.
fn iperf(stand: &Stand, args: &[&str], v6: bool) -> Result<Value> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let mut command = stand.command(0, "iperf3");
        command.args(["-J", "-c", &stand.target(v6), "-p", "5201"]).args(args);
        let output = command.stdin(Stdio::null()).output()?;
        let report: Value = serde_json::from_slice(&output.stdout).context("what iperf3 says")?;
        match report.get("error") {
            None => return report.get("end").cloned().context("iperf3 says nothing of the end"),
            Some(error) if Instant::now() > deadline => bail!("iperf3: {error}"),
            Some(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn number(value: &Value, path: &str) -> Result<f64> {
    value.pointer(path).and_then(Value::as_f64).with_context(|| format!("iperf3 says no {path}"))
}

/// Median and 99th percentile in milliseconds, and loss in a hundred.
fn ping(stand: &Stand, count: u32, interval: &str) -> Result<[f64; 3]> {
    let mut command = stand.command(0, "ping");
    command.args(["-c", &count.to_string(), "-i", interval, "-W", "1", &stand.target(false)]);
    let report = String::from_utf8_lossy(&command.stdin(Stdio::null()).output()?.stdout).into_owned();
    let times = report.split_whitespace().filter_map(|word| word.strip_prefix("time="));
    let mut times: Vec<f64> = times.filter_map(|time| time.parse().ok()).collect();
    ensure!(!times.is_empty(), "no echo came back");
    times.sort_unstable_by(f64::total_cmp);
    let at = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)];
    Ok([at(50), at(99), 100.0 - 100.0 * times.len() as f64 / f64::from(count)])
}
