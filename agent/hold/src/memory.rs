//! A value in memory that outlives the process that wrote it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::HoldError;

/// The longest value a [`Memory`] takes.
pub const MAX_VALUE: usize = 48 << 20;

/// Where the second slot begins; the file is sparse.
const SLOT: u64 = 64 << 20;
const HEADER: usize = 32;
const MAGIC: u64 = u64::from_le_bytes(*b"tombolo\x01");

/// One value in an anonymous file (memfd), replaced as a whole: a writer that dies half way leaves the value before.
///
/// Two slots, each a header (magic, sequence, length, checksum) and the bytes; the slot that is not in use is
/// written, payload first, and becomes the value by its header. The old one is then overwritten with zeros, so that
/// no secret stays behind. Nothing ever reaches a disk's file system (pages may be swapped, as any memory).
///
/// One writer at a time.
#[derive(Debug)]
pub struct Memory {
    file: File,
}

impl Memory {
    /// A new empty one. `name` shows in /proc/PID/fd, and is not unique.
    pub fn create(name: &str) -> Result<Self, HoldError> {
        let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC)
            .map_err(|e| HoldError::io("create a memory file", e))?;
        Ok(Self { file: File::from(fd) })
    }

    /// Another handle on the same value.
    pub fn try_clone(&self) -> Result<Self, HoldError> {
        let file = self.file.try_clone().map_err(|e| HoldError::io("duplicate a memory file", e))?;
        Ok(Self { file })
    }

    /// The value written last, if there is one.
    pub fn read(&self) -> Result<Option<Vec<u8>>, HoldError> {
        let Some((slot, header)) = self.newest()? else { return Ok(None) };
        self.payload(slot, &header)
    }

    /// Replaces the value.
    ///
    /// # Errors
    /// [`HoldError::TooLong`], or the system has no memory; the value is then the one before.
    pub fn write(&self, value: &[u8]) -> Result<(), HoldError> {
        if value.len() > MAX_VALUE {
            return Err(HoldError::TooLong(value.len()));
        }
        let before = self.newest()?;
        let (slot, sequence) = match &before {
            Some((slot, header)) => (1 - slot, header.sequence.wrapping_add(1)),
            None => (0, 1),
        };
        let header = Header { sequence, length: value.len() as u64, sum: checksum(sequence, value) };
        let fail = |e: io::Error| HoldError::io("write a memory file", e);
        self.file.write_all_at(value, slot * SLOT + HEADER as u64).map_err(fail)?;
        self.file.write_all_at(&header.encode(), slot * SLOT).map_err(fail)?;
        if let Some((slot, header)) = before {
            self.erase(slot, header.length)?;
        }
        Ok(())
    }

    /// Overwrites everything with zeros and gives the memory back.
    pub fn wipe(&self) -> Result<(), HoldError> {
        for slot in 0..2 {
            let length = self.header(slot)?.map_or(0, |h| h.length.min(MAX_VALUE as u64));
            self.erase(slot, length)?;
        }
        self.file.set_len(0).map_err(|e| HoldError::io("wipe a memory file", e))
    }

    fn erase(&self, slot: u64, length: u64) -> Result<(), HoldError> {
        let fail = |e: io::Error| HoldError::io("wipe a memory file", e);
        let zeros = [0u8; 4096];
        let end = slot * SLOT + HEADER as u64 + length;
        let mut at = slot * SLOT;
        while at < end {
            let n = (end - at).min(zeros.len() as u64);
            self.file.write_all_at(&zeros[..n as usize], at).map_err(fail)?;
            at += n;
        }
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        // Only gives memory back early; the zeros above are what counts.
        let _ = fallocate(&self.file, hole, (slot * SLOT) as i64, (HEADER as u64 + length) as i64);
        Ok(())
    }

    /// The valid slot with the highest sequence.
    fn newest(&self) -> Result<Option<(u64, Header)>, HoldError> {
        let mut best: Option<(u64, Header)> = None;
        for slot in 0..2 {
            let Some(header) = self.header(slot)? else { continue };
            if best.as_ref().is_some_and(|(_, b)| b.sequence >= header.sequence) {
                continue;
            }
            if self.payload(slot, &header)?.is_some() {
                best = Some((slot, header));
            }
        }
        Ok(best)
    }

    fn header(&self, slot: u64) -> Result<Option<Header>, HoldError> {
        let mut bytes = [0u8; HEADER];
        Ok(if read_at(&self.file, &mut bytes, slot * SLOT)? { Header::decode(&bytes) } else { None })
    }

    fn payload(&self, slot: u64, header: &Header) -> Result<Option<Vec<u8>>, HoldError> {
        let mut value = vec![0u8; header.length as usize];
        let whole = read_at(&self.file, &mut value, slot * SLOT + HEADER as u64)?;
        Ok((whole && checksum(header.sequence, &value) == header.sum).then_some(value))
    }
}

impl From<OwnedFd> for Memory {
    fn from(fd: OwnedFd) -> Self {
        Self { file: File::from(fd) }
    }
}

impl From<Memory> for OwnedFd {
    fn from(memory: Memory) -> Self {
        memory.file.into()
    }
}

impl AsFd for Memory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

struct Header {
    sequence: u64,
    length: u64,
    sum: u64,
}

impl Header {
    fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0u8; HEADER];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip([MAGIC, self.sequence, self.length, self.sum]) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn decode(bytes: &[u8; HEADER]) -> Option<Self> {
        let word = |at: usize| bytes[at..at + 8].iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
        let header = Self { sequence: word(8), length: word(16), sum: word(24) };
        (word(0) == MAGIC && header.length <= MAX_VALUE as u64).then_some(header)
    }
}

/// FNV-1a: it finds torn writes, it guards against nobody.
fn checksum(sequence: u64, value: &[u8]) -> u64 {
    let length = (value.len() as u64).to_le_bytes();
    sequence
        .to_le_bytes()
        .iter()
        .chain(&length)
        .chain(value)
        .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

fn read_at(file: &File, bytes: &mut [u8], at: u64) -> Result<bool, HoldError> {
    match file.read_exact_at(bytes, at) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(HoldError::io("read a memory file", e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_value_is_read_through_any_handle() {
        let memory = Memory::create("test").unwrap();
        assert_eq!(memory.read().unwrap(), None);
        let other = memory.try_clone().unwrap();
        for value in [&b"one"[..], b"", b"three, and longer than the others", b"4"] {
            memory.write(value).unwrap();
            assert_eq!(other.read().unwrap().as_deref(), Some(value));
        }
    }

    #[test]
    fn a_torn_write_leaves_the_value_before() {
        let memory = Memory::create("test").unwrap();
        memory.write(b"first").unwrap();
        memory.write(b"second").unwrap();
        // A writer that died: payload in the free slot, header with a sum that does not fit it.
        let header = Header { sequence: 3, length: 5, sum: 7 };
        memory.file.write_all_at(b"third", HEADER as u64).unwrap();
        memory.file.write_all_at(&header.encode(), 0).unwrap();
        assert_eq!(memory.read().unwrap().as_deref(), Some(&b"second"[..]));
        memory.write(b"fourth").unwrap();
        assert_eq!(memory.read().unwrap().as_deref(), Some(&b"fourth"[..]));
    }

    #[test]
    fn nothing_of_an_old_value_stays() {
        let memory = Memory::create("test").unwrap();
        let contains = |needle: &[u8]| {
            [0, SLOT].iter().any(|at| {
                let mut bytes = vec![0u8; 256];
                let n = memory.file.read_at(&mut bytes, *at).unwrap();
                bytes[..n].windows(needle.len()).any(|w| w == needle)
            })
        };
        memory.write(b"a secret key").unwrap();
        assert!(contains(b"a secret key"));
        memory.write(b"another").unwrap();
        assert!(!contains(b"a secret key"));
        memory.wipe().unwrap();
        assert_eq!(memory.read().unwrap(), None);
        assert_eq!(memory.file.metadata().unwrap().len(), 0);
    }

    #[test]
    fn too_long_a_value_changes_nothing() {
        let memory = Memory::create("test").unwrap();
        memory.write(b"kept").unwrap();
        assert!(matches!(memory.write(&vec![0; MAX_VALUE + 1]), Err(HoldError::TooLong(_))));
        assert_eq!(memory.read().unwrap().as_deref(), Some(&b"kept"[..]));
    }
}
