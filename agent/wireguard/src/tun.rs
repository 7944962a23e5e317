//! The TUN: packets of the host.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use thiserror::Error;

use crate::name::DeviceName;
use crate::offload::Offloads;

/// Room for 1500 on the wire less the largest overhead (IPv6, UDP, WireGuard), as every implementation has it.
const MTU: libc::c_int = 1420;

/// What waits here while a worker is restarted is not lost.
const QUEUE: libc::c_int = 4096;

const DEVICE: &str = "/dev/net/tun";

/// Of linux/if_tun.h.
const TUN_F_USO4: libc::c_uint = 0x20;
const TUN_F_USO6: libc::c_uint = 0x40;

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
    /// Whether each packet has a [`crate::vnet`] header before it.
    vnet: bool,
}

/// The helps of the kernel that a TUN has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Helps {
    /// Packets come, and may be written, with a header of [`crate::vnet`].
    pub vnet: bool,
    /// TCP of up to 64 KiB may be written.
    pub tcp: bool,
    /// UDP of up to 64 KiB may be written.
    pub udp: bool,
}

impl Tun {
    /// Creates interface `name`, which must not exist: no packet information, MTU 1420, a long queue, down; with headers
    /// for offloads, if those are wanted.
    pub fn create(name: &DeviceName, offloads: Offloads) -> Result<Self, TunError> {
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
        let vnet = if offloads.vnet { libc::IFF_VNET_HDR } else { 0 };
        let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_TUN_EXCL | vnet;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
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
        Ok(Self { file, vnet: offloads.vnet })
    }

    /// Takes one that was held: by an earlier process, perhaps of another release.
    pub fn from_held(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        // SAFETY: a plain C struct; all zeros are a valid value of every field.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let tungetiff = nix::request_code_read!(b'T', 210, size_of::<libc::c_uint>());
        ioctl(&file, tungetiff, &mut request)?;
        // SAFETY: the call that succeeded wrote this field of the union.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        Ok(Self { file, vnet: libc::c_int::from(flags) & libc::IFF_VNET_HDR != 0 })
    }

    /// Asks the kernel for its helps. They last until they are asked for anew, whoever holds the device.
    pub fn set_offloads(&self, offloads: Offloads) -> Helps {
        let (tso, uso) = (offloads.vnet && offloads.tso, offloads.vnet && offloads.uso);
        let of = |tso: bool, uso: bool| {
            let checksum = if tso || uso { libc::TUN_F_CSUM } else { 0 };
            let tcp = if tso { libc::TUN_F_TSO4 | libc::TUN_F_TSO6 } else { 0 };
            checksum | tcp | if uso { TUN_F_USO4 | TUN_F_USO6 } else { 0 }
        };
        // Kernels before 6.2 have none for UDP, and take no such packets either.
        let uso = self.vnet && self.offload(of(tso, uso)) && uso;
        let tso = self.vnet && (uso || self.offload(of(tso, false)) || self.offload(0)) && tso;
        tracing::debug!(self.vnet, tso, uso, "offloads of the TUN");
        Helps { vnet: self.vnet, tcp: self.vnet && offloads.join, udp: uso && offloads.join }
    }

    fn offload(&self, flags: libc::c_uint) -> bool {
        let tunsetoffload = nix::request_code_write!(b'T', 208, size_of::<libc::c_uint>());
        // SAFETY: this code takes a number, no pointer.
        unsafe { libc::ioctl(self.file.as_raw_fd(), tunsetoffload, libc::c_ulong::from(flags)) == 0 }
    }

    /// The next packet from the host, after its header if there are headers.
    ///
    /// # Errors
    /// `WouldBlock`: none waits. EBADFD: the interface was deleted.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    /// Hands a packet to the host: its header, which is left out if there are none, and its parts.
    pub fn write(&self, header_and_packet: &[IoSlice<'_>]) -> io::Result<()> {
        let skip = if self.vnet { 0 } else { 1 };
        (&self.file).write_vectored(header_and_packet.get(skip..).unwrap_or_default()).map(drop)
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
