//! Which devices a node has: the kernel's or our own.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use clap::ValueEnum;
use tokio::time::{Instant, sleep};
use tombolo_proto::model::DeviceNumber;
use tracing::info;

use super::Writes;
use super::device::{DeviceChange, DeviceError, DeviceState, TunnelDriver};
use super::kernel::Kernel;
use super::uapi::{LOOK, PATIENCE, Userspace};

/// What new devices are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Choice {
    /// The kernel's where it has WireGuard, else userspace. Devices that are there stay what they are.
    #[default]
    Auto,
    /// The kernel's.
    Kernel,
    /// Those of `tombolo-wireguard serve`.
    Userspace,
}

/// Devices of both kinds, each asked where it is.
pub struct Drivers {
    choice: Choice,
    kernel: Kernel,
    userspace: Userspace,
    /// This kernel has no WireGuard.
    missing: AtomicBool,
    /// Whether a device is the kernel's, as it was found last.
    found: Mutex<BTreeMap<DeviceNumber, bool>>,
}

impl Drivers {
    /// As [`Kernel::open`] and [`Userspace::new`].
    ///
    /// # Errors
    /// If there is no netlink socket to be had.
    pub fn open(choice: Choice, devices: PathBuf, sockets: PathBuf, writes: Arc<Writes>) -> io::Result<Self> {
        let userspace = Userspace::new(devices, sockets, writes.clone());
        let kernel = Kernel::open(writes)?;
        Ok(Self { choice, kernel, userspace, missing: AtomicBool::new(false), found: Mutex::default() })
    }

    async fn of(&self, number: DeviceNumber) -> Result<&dyn TunnelDriver, DeviceError> {
        let found = self.found(|found| found.get(&number).copied());
        let is_kernel = match found {
            Some(is) => is,
            None => {
                let is = self.kernel.list().await?.contains(&number);
                self.found(|found| found.insert(number, is));
                is
            }
        };
        Ok(if is_kernel { &self.kernel } else { &self.userspace })
    }

    /// Makes a device of the kernel's in the place of one of userspace, whose link ends a moment after it.
    async fn succeed(&self, number: DeviceNumber) -> Result<bool, DeviceError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.kernel.create(number).await {
                Err(DeviceError::Foreign(_)) if Instant::now() < deadline => sleep(LOOK).await,
                other => return other,
            }
        }
    }

    fn found<T>(&self, look: impl FnOnce(&mut BTreeMap<DeviceNumber, bool>) -> T) -> T {
        look(&mut self.found.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What fails may be another device than it was: it is looked for anew.
    fn told<T>(&self, number: DeviceNumber, result: Result<T, DeviceError>) -> Result<T, DeviceError> {
        if result.is_err() {
            self.found(|found| found.remove(&number));
        }
        result
    }
}

#[async_trait]
impl TunnelDriver for Drivers {
    async fn list(&self) -> Result<BTreeSet<DeviceNumber>, DeviceError> {
        let mut all = self.kernel.list().await?;
        all.extend(self.userspace.list().await?);
        Ok(all)
    }

    async fn create(&self, number: DeviceNumber) -> Result<bool, DeviceError> {
        self.found(|found| found.remove(&number));
        let in_kernel = self.kernel.list().await?.contains(&number);
        let in_userspace = self.userspace.list().await?.contains(&number);
        match self.choice {
            Choice::Auto if in_kernel => return Ok(false),
            Choice::Auto if in_userspace || self.missing.load(Ordering::Relaxed) => {
                return self.userspace.create(number).await;
            }
            Choice::Auto => {}
            Choice::Kernel if in_userspace => {
                // What is there is taken away for something alone.
                self.kernel.require().await?;
                self.userspace.remove(number).await?;
                return self.succeed(number).await;
            }
            Choice::Kernel => {}
            Choice::Userspace => {
                if in_kernel {
                    self.kernel.remove(number).await?;
                }
                return self.userspace.create(number).await;
            }
        }
        match self.kernel.create(number).await {
            Err(error) if self.choice == Choice::Auto && Kernel::is_missing(&error) => {
                if !self.missing.swap(true, Ordering::Relaxed) {
                    info!("this kernel has no WireGuard: devices are userspace ones");
                }
                self.userspace.create(number).await
            }
            other => other,
        }
    }

    async fn remove(&self, number: DeviceNumber) -> Result<(), DeviceError> {
        let result = self.of(number).await?.remove(number).await;
        self.found(|found| found.remove(&number));
        result
    }

    async fn read(&self, number: DeviceNumber) -> Result<DeviceState, DeviceError> {
        let result = self.of(number).await?.read(number).await;
        self.told(number, result)
    }

    async fn write(&self, number: DeviceNumber, change: &DeviceChange<'_>) -> Result<(), DeviceError> {
        let result = self.of(number).await?.write(number, change).await;
        self.told(number, result)
    }
}
