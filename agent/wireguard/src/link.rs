//! The device's two sides on this host: the TUN and the UDP sockets, with the boxes before them.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use crate::coalesce::{Inbox, Joins};
use crate::device::Wire;
use crate::elder::{Elder, Left};
use crate::noise::BUFFER;
use crate::offload::Offloads;
use crate::outbox::Outbox;
use crate::segment::{Packets, Segments};
use crate::tun::{Helps, Tun};
use crate::udp::Udp;
use crate::vnet::{self, Kind, Vnet};

/// Room for packets to the host: as much as two calls receive.
const INBOX: usize = 2 * BUFFER;

/// The TUN and the sockets, and what is on its way to them.
#[derive(Debug)]
pub struct Links {
    /// The TUN.
    pub tun: Tun,
    /// The sockets, once there is a key.
    pub udp: Option<Udp>,
    /// The worker before this one, while it lingers.
    pub elder: Option<Elder>,
    helps: Helps,
    outbox: Outbox,
    inbox: Inbox,
}

impl Links {
    /// Of what was held; the sockets come when there are some.
    pub fn new(tun: OwnedFd, offloads: Offloads) -> io::Result<Self> {
        let tun = Tun::from_held(tun)?;
        let helps = tun.set_offloads(offloads);
        let joins = Joins { tcp: helps.tcp, udp: helps.udp };
        Ok(Self {
            tun,
            udp: None,
            elder: None,
            helps,
            outbox: Outbox::new(BUFFER),
            inbox: Inbox::new(INBOX, joins),
        })
    }

    /// Reads what the host sends next: packets of one flow, or `None` for something that is no packet.
    ///
    /// # Errors
    /// As [`Tun::read`].
    pub fn read<'b>(&self, buffer: &'b mut [u8]) -> io::Result<Option<Segments<'b>>> {
        let length = self.tun.read(buffer)?;
        let all = buffer.get_mut(..length).unwrap_or_default();
        let packets = if self.helps.vnet {
            let Some((header, packet)) = all.split_first_chunk_mut::<{ vnet::LENGTH }>() else {
                return Ok(None);
            };
            Vnet::parse(header).ok().and_then(|vnet| Segments::new(vnet, packet).ok())
        } else {
            Segments::new(Vnet::default(), all).ok()
        };
        Ok(packets)
    }

    /// Whether as much waits for the network as is sent at once.
    pub fn is_full(&self) -> bool {
        self.outbox.is_full()
    }

    /// Sends what waits for the network.
    pub fn send_all(&mut self) {
        let Self { udp, outbox, .. } = self;
        outbox.drain(|to, datagrams, size| {
            if let Some(Err(error)) = udp.as_mut().map(|udp| udp.send(to, datagrams, size)) {
                tracing::trace!(%to, %error, "datagrams not sent");
            }
        });
    }

    fn leave(&mut self, left: Left<'_>) -> bool {
        let left = self.elder.as_ref().map(|elder| elder.leave(left));
        if let Some(Err(error)) = left {
            tracing::debug!(%error, "the worker before is gone");
            self.elder = None;
        }
        matches!(left, Some(Ok(())))
    }

    /// Hands over what waits for the host.
    pub fn deliver_all(&mut self) {
        let Self { tun, inbox, .. } = self;
        let mut refused = None;
        inbox.drain(|parts| match tun.write(parts) {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput && parts.len() > 2 => {
                refused = write_singly(tun, parts).or(refused);
            }
            Err(error) => tracing::trace!(%error, "packet not delivered"),
            Ok(()) => {}
        });
        if let Some(kind) = refused {
            tracing::info!(?kind, "the kernel takes no joined packets: handing them over one by one");
            let joins = self.inbox.joins();
            self.inbox.set_joins(match kind {
                Kind::Udp => Joins { udp: false, ..joins },
                Kind::Tcp4 | Kind::Tcp6 => Joins { tcp: false, ..joins },
            });
        }
    }
}

/// Cuts again what the kernel did not take joined. Says what it was.
fn write_singly(tun: &Tun, parts: &[IoSlice<'_>]) -> Option<Kind> {
    let (header, packet) = parts.split_first()?;
    let vnet = Vnet::parse(header.first_chunk()?).ok()?;
    let mut packet: Vec<u8> = packet.iter().flat_map(|part| part.iter().copied()).collect();
    let mut segments = Segments::new(vnet, &mut packet).ok()?;
    let plain = Vnet::default().bytes();
    while let Some(segment) = segments.next() {
        if let Err(error) = tun.write(&[IoSlice::new(&plain), IoSlice::new(segment)]) {
            tracing::trace!(%error, "packet not delivered");
        }
    }
    vnet.cut.map(|cut| cut.kind)
}

impl Wire for Links {
    fn datagram(&mut self, length: usize) -> &mut [u8] {
        if !self.outbox.has_room(length) {
            self.send_all();
        }
        self.outbox.room()
    }

    fn send(&mut self, to: SocketAddr, length: usize) {
        self.outbox.push(to, length);
    }

    fn packet(&mut self, length: usize) -> &mut [u8] {
        if !self.inbox.has_room(length) {
            self.deliver_all();
        }
        self.inbox.room()
    }

    fn deliver(&mut self, length: usize) {
        self.inbox.push(length);
    }

    fn has_elder(&self) -> bool {
        self.elder.is_some()
    }

    fn leave_datagrams(&mut self, from: SocketAddr, datagrams: &[u8], size: usize) {
        self.leave(Left::Datagrams { from, size, datagrams });
    }

    fn leave_packet(&mut self, packet: &[u8]) -> bool {
        self.leave(Left::Packet(packet))
    }
}
