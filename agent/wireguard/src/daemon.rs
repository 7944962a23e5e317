//! Going to the background, as `wg-quick` expects: the command returns when the device can be configured.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};

use thiserror::Error;

use crate::name::DeviceName;

/// The word with which the background process says that it is ready.
const READY: &str = "ready\n";

/// Why there is no device in the background.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// It said why.
    #[error("{0}")]
    Said(String),
    /// It ended without a word.
    #[error("the device ended at once: run it with --foreground to see why")]
    Silent,
    /// It could not be started.
    #[error("cannot start a background process: {0}")]
    Start(#[source] io::Error),
}

/// Starts the device in the background and waits until it is ready. It keeps stderr only if somebody asked for its
/// log, since a caller may wait for the end of what we write there.
pub fn start(name: &DeviceName, keep_log: bool) -> Result<(), DaemonError> {
    let program = std::env::current_exe().map_err(DaemonError::Start)?;
    let mut child = Command::new(program)
        .args(["--foreground", "--detached", name.as_str()])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(if keep_log { Stdio::inherit() } else { Stdio::null() })
        .spawn()
        .map_err(DaemonError::Start)?;
    let mut said = String::new();
    if let Some(stdout) = child.stdout.take() {
        // A line, or the end.
        let _ = BufReader::new(stdout.take(4096)).read_line(&mut said);
    }
    match said.as_str() {
        READY => Ok(()),
        "" => Err(DaemonError::Silent),
        other => Err(DaemonError::Said(other.trim_end().to_owned())),
    }
}

/// In the background process: leaves the terminal's session.
pub fn detach() {
    // Fails only for one that leads a session already.
    let _ = nix::unistd::setsid();
}

/// In the background process: tells who started it.
pub fn tell(result: Result<(), &str>) {
    let mut out = io::stdout();
    let line = result.map_or_else(|error| format!("{}\n", error.replace('\n', " ")), |()| READY.to_owned());
    // It may not care any more.
    let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
}

/// Where the system's log listens, journald too.
const SYSTEM_LOG: &str = "/dev/log";

/// A warning of the facility "daemon" (RFC 3164).
const WARNING: u8 = (3 << 3) | 4;

/// Says a line for people to the system's log, if nobody hears our own: as under `wg-quick`.
pub fn tell_system(line: &str) {
    if std::fs::read_link("/proc/self/fd/2").is_ok_and(|to| to == Path::new("/dev/null")) {
        // There may be none.
        let _ = log_to(Path::new(SYSTEM_LOG), line);
    }
}

fn log_to(log: &Path, line: &str) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    let line = line.replace('\n', " ");
    socket
        .send_to(format!("<{WARNING}>tombolo-wireguard[{}]: {line}", std::process::id()).as_bytes(), log)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_s_log_gets_one_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        assert!(log_to(&path, "nobody").is_err());
        let log = UnixDatagram::bind(&path).unwrap();
        log_to(&path, "wg0: two\nlines").unwrap();
        let mut buffer = [0; 200];
        let length = log.recv(&mut buffer).unwrap();
        let expected = format!("<28>tombolo-wireguard[{}]: wg0: two lines", std::process::id());
        assert_eq!(std::str::from_utf8(&buffer[..length]).unwrap(), expected);
    }
}
