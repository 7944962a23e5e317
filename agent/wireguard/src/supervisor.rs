//! The process that holds what a device consists of.

use thiserror::Error;
use tombolo_hold::{Event, HoldError, Memory, Supervisor};

use crate::name::DeviceName;
use crate::offload::Offloads;
use crate::server::{self, SocketError};
use crate::tun::{Tun, TunError};
use crate::worker;

/// Why a device could not be created.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// No interface.
    #[error(transparent)]
    Tun(#[from] TunError),
    /// No UAPI socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// No memory, descriptors or processes.
    #[error(transparent)]
    Hold(#[from] HoldError),
}

/// Creates the device `name` and runs it to its end; `ready` is called once it can be configured. Returns the
/// worker's exit code.
pub fn run(name: &DeviceName, ready: impl FnOnce()) -> Result<i32, DeviceError> {
    let tun = Tun::create(name, Offloads::from_env())?;
    let listener = server::listen(name)?;
    let path = server::path_of(name);
    let inode = server::inode(&path);
    let result = supervise(name, tun, listener, ready);
    server::remove(&path, inode);
    result
}

fn supervise(
    name: &DeviceName,
    tun: Tun,
    listener: std::os::unix::net::UnixListener,
    ready: impl FnOnce(),
) -> Result<i32, DeviceError> {
    let memory = Memory::create("tombolo-wireguard")?;
    let state = memory.try_clone()?;
    let mut supervisor = Supervisor::current_exe(["worker", name.as_str()])?;
    for (what, fd) in worker::holdings(tun, listener, memory) {
        supervisor.hold(what, fd)?;
    }
    let mut ready = Some(ready);
    let code = supervisor.run(|event| match event {
        Event::Started { pid } => {
            tracing::info!(device = %name, pid, "worker started");
            if let Some(ready) = ready.take() {
                ready();
            }
        }
        Event::Died { how, restart_in } => {
            tracing::warn!(device = %name, ?restart_in, "worker {how}: restarting")
        }
        Event::Failed { error, restart_in } => {
            tracing::error!(device = %name, %error, ?restart_in, "no worker")
        }
    });
    if let Err(error) = state.wipe() {
        tracing::warn!(device = %name, %error, "the configuration was not wiped");
    }
    tracing::info!(device = %name, "ended");
    Ok(code?)
}
