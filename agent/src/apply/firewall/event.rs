//! What the kernel tells of transactions on nft tables: how a listing is known to be still true. Listing 10,000 services
//! takes seconds, knowing that nobody touched them takes none.

use std::io;

use nix::sys::socket::{setsockopt, sockopt};
use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{Socket, SocketAddr};

/// `NFNLGRP_NFTABLES`
const GROUP: u32 = 7;
/// `NFNL_SUBSYS_NFTABLES`
const SUBSYSTEM: u16 = 10;
/// `NFT_MSG_NEWGEN`: the end of a transaction.
const NEW_GENERATION: u16 = 15;
/// `NFTA_TABLE_NAME`; in messages about what is in a table, the table's name has the same number.
const TABLE_NAME: u16 = 1;
/// Receive buffer, bytes: a transaction on 100,000 elements. When it overflows we hear of it.
const BUFFER: usize = 32 << 20;

/// Makes a new socket of [`NETLINK_NETFILTER`] be told of all transactions in its network namespace.
pub(crate) fn join(socket: &mut Socket) -> io::Result<()> {
    socket.bind(&SocketAddr::new(0, 0))?;
    // Less is enough, only not always.
    let _ = setsockopt(socket, sockopt::RcvBufForce, &BUFFER);
    socket.add_membership(GROUP)
}

/// One thing told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// Something in our table changed, or the table itself.
    Ours,
    /// A transaction ended.
    End,
}

/// The events in a datagram, in order; what is of other tables is left out.
pub(crate) fn events(mut datagram: &[u8]) -> Vec<Event> {
    let mut events = Vec::new();
    // nlmsghdr: length u32, type u16, flags u16, sequence u32, port u32; nfgenmsg: 4 bytes; attributes.
    while let [l0, l1, l2, l3, t0, t1, ..] = *datagram {
        let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
        let kind = u16::from_ne_bytes([t0, t1]);
        let Some(message) = datagram.get(..length).filter(|m| m.len() >= 20) else { break };
        if kind == SUBSYSTEM << 8 | NEW_GENERATION {
            events.push(Event::End);
        } else if kind >> 8 == SUBSYSTEM && names_our_table(&message[20..]) {
            events.push(Event::Ours);
        }
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    events
}

fn names_our_table(mut attributes: &[u8]) -> bool {
    while let [l0, l1, k0, k1, ..] = *attributes {
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let Some(value) = attributes.get(4..length) else { return false };
        if u16::from_ne_bytes([k0, k1]) & 0x3fff == TABLE_NAME {
            return value == b"tombolo\0";
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

/// Counts the transactions that changed our table.
pub(super) struct Transactions {
    socket: Socket,
    open: bool,
}

impl Transactions {
    pub(super) fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        join(&mut socket)?;
        socket.set_non_blocking(true)?;
        Ok(Self { socket, open: false })
    }

    /// How many ended since the last call; `None`: unknown.
    pub(super) fn count(&mut self) -> Option<u64> {
        let mut count = 0;
        let mut known = true;
        loop {
            match self.socket.recv_from_full() {
                Ok((datagram, _)) => {
                    for event in events(&datagram) {
                        match event {
                            Event::Ours => self.open = true,
                            Event::End => count += u64::from(std::mem::take(&mut self.open)),
                        }
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return known.then_some(count),
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => known = false,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, table: &[u8]) -> Vec<u8> {
        let mut attribute = Vec::from((4 + table.len() as u16).to_ne_bytes());
        attribute.extend(TABLE_NAME.to_ne_bytes());
        attribute.extend(table);
        attribute.resize(attribute.len().next_multiple_of(4), 0);
        let mut message = Vec::from((20 + attribute.len() as u32).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.resize(20, 0);
        message.extend(attribute);
        message
    }

    #[test]
    fn messages_about_our_table_are_told_from_others() {
        let ours = message(SUBSYSTEM << 8 | 12, b"tombolo\0");
        let other = message(SUBSYSTEM << 8 | 12, b"kube-proxy\0");
        let end = message(SUBSYSTEM << 8 | NEW_GENERATION, &[0, 0, 0, 1]);
        assert_eq!(events(&[&other[..], &ours, &other, &end].concat()), [Event::Ours, Event::End]);
        assert_eq!(events(&message(2 << 8, b"tombolo\0")), []);
        for cut in 0..ours.len() {
            assert_eq!(events(&ours[..cut]), [], "{cut}");
        }
        for length in 0..24u8 {
            events(&[&[length, 0, 0, 0][..], &ours[4..]].concat());
        }
    }
}
