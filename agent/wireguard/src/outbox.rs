//! Datagrams to the network, in groups that the kernel takes with one call (UDP_SEGMENT).

use std::net::SocketAddr;

/// Datagrams in a group at most: what every kernel takes.
const MOST: usize = 64;

/// Bytes in a group at most: the payload of the longest UDP packet over IPv4.
const LONGEST: usize = 65507;

/// Groups in the box at most.
const GROUPS: usize = 512;

/// Bytes that are gathered before they are sent.
const FULL: usize = 256 << 10;

/// A box for datagrams, which are made in it one behind the other.
#[derive(Debug)]
pub struct Outbox {
    buffer: Box<[u8]>,
    used: usize,
    groups: Vec<Group>,
}

/// Datagrams to one address: all have one length, but for the last, which may be shorter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Group {
    to: SocketAddr,
    start: usize,
    end: usize,
    size: usize,
}

impl Outbox {
    /// A box that is full at 256 KiB, with room for `more` bytes beyond.
    pub fn new(more: usize) -> Self {
        Self { buffer: vec![0; FULL + more].into_boxed_slice(), used: 0, groups: Vec::with_capacity(GROUPS) }
    }

    /// Whether it is time to send.
    pub fn is_full(&self) -> bool {
        self.used >= FULL
    }

    /// Whether a datagram of so many bytes can be made in it.
    pub fn has_room(&self, length: usize) -> bool {
        self.buffer.len() - self.used >= length && self.groups.len() < GROUPS
    }

    /// Where the next datagram is made.
    pub fn room(&mut self) -> &mut [u8] {
        &mut self.buffer[self.used..]
    }

    /// Takes what was made in the room: the first so many bytes of it.
    pub fn push(&mut self, to: SocketAddr, length: usize) {
        let (start, end) = (self.used, (self.used + length).min(self.buffer.len()));
        if start == end {
            return;
        }
        let room = self.groups.len() < GROUPS;
        match self.groups.last_mut().filter(|group| group.takes(to, end - start)) {
            Some(group) => group.end = end,
            None if room => self.groups.push(Group { to, start, end, size: end - start }),
            None => return,
        }
        self.used = end;
    }

    /// Hands out all groups, in order, with the length of their datagrams, and is empty then.
    pub fn drain(&mut self, mut send: impl FnMut(SocketAddr, &[u8], usize)) {
        for group in &self.groups {
            send(group.to, &self.buffer[group.start..group.end], group.size);
        }
        self.groups.clear();
        self.used = 0;
    }
}

impl Group {
    fn takes(&self, to: SocketAddr, length: usize) -> bool {
        let now = self.end - self.start;
        self.to == to
            && length <= self.size
            // A shorter one was the last.
            && now.is_multiple_of(self.size)
            && now / self.size < MOST
            && now + length <= LONGEST
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn groups_hold_all_in_order_and_the_kernels_rules(datagrams in prop::collection::vec((0u16..3, prop_oneof![Just(1452usize), 1usize..3000, Just(32)]), 0..300)) {
            let mut outbox = Outbox::new(3000);
            let (mut sent, mut made) = (Vec::new(), Vec::new());
            let mut groups = 0;
            let mut flush = |outbox: &mut Outbox, made_now: usize| {
                let before = sent.len();
                outbox.drain(|to, bytes, size| {
                    groups += 1;
                    assert!(bytes.len() <= LONGEST && bytes.len().div_ceil(size) <= MOST);
                    sent.extend(bytes.chunks(size).map(|d| (to, d.to_vec())));
                });
                assert_eq!(sent.len() - before, made_now);
            };
            let mut waiting = 0;
            for (i, (to, length)) in datagrams.into_iter().enumerate() {
                if outbox.is_full() || !outbox.has_room(length) {
                    flush(&mut outbox, std::mem::take(&mut waiting));
                }
                let to = SocketAddr::from(([10, 0, 0, 1], to));
                outbox.room()[..length].fill(i as u8);
                outbox.push(to, length);
                waiting += 1;
                made.push((to, vec![i as u8; length]));
            }
            flush(&mut outbox, waiting);
            prop_assert!(groups <= made.len());
            prop_assert_eq!(sent, made);
        }
    }

    #[test]
    fn a_stream_of_full_datagrams_needs_few_groups() {
        let mut outbox = Outbox::new(2000);
        let to = SocketAddr::from(([10, 0, 0, 1], 1));
        (0..90).for_each(|_| outbox.push(to, 1452));
        let mut groups = Vec::new();
        outbox.drain(|_, bytes, size| groups.push((bytes.len() / size, size)));
        assert_eq!(groups, [(45, 1452), (45, 1452)]);
    }
}
