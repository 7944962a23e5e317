//! The TUN: packets of the host.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use thiserror::Error;

use crate::name::DeviceName;

/// Room for 1500 on the wire less the largest overhead (IPv6, UDP, WireGuard), as every implementation has it.
const MTU: libc::c_int = 1420;

/// What waits here while a worker is restarted is not lost.
const QUEUE: libc::c_int = 4096;

const DEVICE: &str = "/dev/net/tun";

/// Why there is no TUN, in a line for people.
#[derive(Debug, Error)]
pub enum TunError {
    /// The kernel has no TUN, or the container no device file.
    #[error(
        "there is no {DEVICE}: load the kernel's module (`modprobe tun`), or give the container that device"
    )]
    Missing,
    /// The device file may not be opened.
    #[error("{DEVICE} may not be opened: run as root (in a container: allow the device {DEVICE})")]
    Forbidden,
    /// No right to make interfaces.
    #[error("interface {0} may not be created: run as root, or with the capability CAP_NET_ADMIN")]
    NoNetAdmin(DeviceName),
    /// The name is in use.
    #[error("there is an interface {0} already: choose another name, or remove it (`ip link del {0}`)")]
    Taken(DeviceName),
    /// Anything else.
    #[error("cannot {what} interface {name}: {source}")]
    Other {
        /// The operation.
        what: &'static str,
        /// Which.
        name: DeviceName,
        /// Why.
        source: io::Error,
    },
}

/// A TUN device, which lives as long as a descriptor of it is open.
#[derive(Debug)]
pub struct Tun {
    file: File,
}

impl Tun {
    /// Creates interface `name`, which must not exist: no packet information, MTU 1420, a long queue, down.
    pub fn create(name: &DeviceName) -> Result<Self, TunError> {
        let other = |what| move |source| TunError::Other { what, name: name.clone(), source };
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
        let file = options.open(DEVICE).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => TunError::Missing,
            io::ErrorKind::PermissionDenied => TunError::Forbidden,
            _ if matches!(e.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => TunError::Missing,
            _ => other("create")(e),
        })?;
        if nix::net::if_::if_nametoindex(name.as_str()).is_ok() {
            return Err(TunError::Taken(name.clone()));
        }
        let mut request = request(name);
        request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_TUN_EXCL) as libc::c_short;
        let tunsetiff = nix::request_code_write!(b'T', 202, size_of::<libc::c_int>());
        ioctl(&file, tunsetiff, &mut request).map_err(|e| match e.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => TunError::NoNetAdmin(name.clone()),
            Some(libc::EBUSY | libc::EEXIST) => TunError::Taken(name.clone()),
            _ => other("create")(e),
        })?;
        let control = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
            .map_err(io::Error::from)
            .map_err(other("set up"))?;
        request.ifr_ifru.ifru_mtu = MTU;
        ioctl(&control, libc::SIOCSIFMTU as libc::Ioctl, &mut request).map_err(other("set the MTU of"))?;
        request.ifr_ifru.ifru_metric = QUEUE;
        ioctl(&control, libc::SIOCSIFTXQLEN as libc::Ioctl, &mut request)
            .map_err(other("set the queue of"))?;
        Ok(Self { file })
    }

    /// The next packet from the host.
    ///
    /// # Errors
    /// `WouldBlock`: none waits. EBADFD: the interface was deleted.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    /// Hands a packet to the host.
    pub fn write(&self, packet: &[u8]) -> io::Result<()> {
        (&self.file).write(packet).map(drop)
    }
}

impl From<OwnedFd> for Tun {
    fn from(fd: OwnedFd) -> Self {
        Self { file: fd.into() }
    }
}

impl From<Tun> for OwnedFd {
    fn from(tun: Tun) -> Self {
        tun.file.into()
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn request(name: &DeviceName) -> libc::ifreq {
    // SAFETY: a plain C struct; all zeros are a valid value of every field.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // A name has 15 bytes at most, the field 16.
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_str().bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn ioctl(fd: &impl AsRawFd, code: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: all codes used here take a pointer to an ifreq, which lives through the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), code, std::ptr::from_mut(request)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
