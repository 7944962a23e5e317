//! The agent's admin pages, by as little HTTP as they need.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tombolo_agent_core::world::Health;

use crate::output::plain;

/// Bytes of an answer.
const MAX: u64 = 8 * 1024 * 1024;

/// Something wrong, as an agent or a directory tells it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Finding {
    pub(super) severity: String,
    pub(super) reason: String,
    pub(super) object: String,
    pub(super) message: String,
}

impl Finding {
    /// Where it is told what it means, harms, and what to do.
    pub(super) fn page(&self) -> String {
        let anchor = self.reason.chars().filter(char::is_ascii_alphanumeric).collect::<String>();
        format!("docs/troubleshooting.md#{}", anchor.to_ascii_lowercase())
    }
}

impl From<&tombolo_agent_core::finding::Finding> for Finding {
    fn from(finding: &tombolo_agent_core::finding::Finding) -> Self {
        let severity = match finding.severity {
            tombolo_agent_core::finding::Severity::Error => "error",
            tombolo_agent_core::finding::Severity::Warning => "warning",
        };
        Self {
            severity: severity.to_owned(),
            reason: finding.reason.to_owned(),
            object: finding.object.clone(),
            message: finding.message.clone(),
        }
    }
}

/// What the agent finds wrong.
pub(super) fn findings(admin: SocketAddr) -> io::Result<Vec<Finding>> {
    let (status, body) = get(admin, "/debug/findings")?;
    if status != 200 {
        return Err(io::Error::other(format!("/debug/findings answers {status}")));
    }
    serde_json::from_str(&body)
        .map_err(|_| io::Error::other("its findings cannot be read; is it another version?"))
}

/// What the agent found out of its peers; None before its first plan.
pub(super) fn health(admin: SocketAddr) -> io::Result<Option<Health>> {
    let (status, body) = get(admin, "/debug/health")?;
    if status != 200 {
        return Err(io::Error::other(format!("/debug/health answers {status}")));
    }
    serde_json::from_str(&body)
        .map_err(|_| io::Error::other("its health cannot be read; is it another version?"))
}

/// Whether the agent is ready, and what is not.
pub(super) fn readiness(admin: SocketAddr) -> io::Result<(bool, Vec<String>)> {
    let (status, body) = get(admin, "/readyz?verbose")?;
    let problems = body.lines().filter(|line| line.starts_with("[-]")).map(plain).collect();
    Ok((status == 200, problems))
}

/// Packets that the node's firewall has dropped since its table was made, by counter.
pub(super) fn dropped(admin: SocketAddr) -> io::Result<BTreeMap<String, u64>> {
    let (_, body) = get(admin, "/metrics")?;
    let read = |line: &str| {
        let (name, count) = line.strip_prefix("tombolo_dropped_packets{reason=\"")?.split_once("\"} ")?;
        Some((plain(name), count.parse().ok()?))
    };
    Ok(body.lines().filter_map(read).collect())
}

fn get(admin: SocketAddr, path: &str) -> io::Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&admin, Duration::from_secs(1))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.set_write_timeout(Some(Duration::from_secs(2)))?;
    // 1.0: no chunks in the answer.
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {admin}\r\n\r\n").as_bytes())?;
    let mut bytes = Vec::new();
    stream.take(MAX).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let other = || io::Error::other("what answers there is no agent");
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(other)?;
    let status = head.strip_prefix("HTTP/1.").and_then(|h| h.split(' ').nth(1)).and_then(|s| s.parse().ok());
    Ok((status.ok_or_else(other)?, body.to_owned()))
}
