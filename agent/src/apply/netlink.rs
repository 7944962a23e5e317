//! A route netlink socket: whole dumps, acknowledged changes, every change counted.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use rtnetlink::Handle;
use rtnetlink::packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    AfSpecInet, AfSpecUnspec, LinkAttribute, LinkFlags, LinkLayerType, LinkMessage,
};
use rtnetlink::sys::AsyncSocket;
use thiserror::Error;
use tokio::sync::Mutex;
use tokio::task::AbortHandle;
use tombolo_proto::model::DeviceNumber;

use super::Writes;

/// The dump changed while it was read (`NLM_F_DUMP_INTR`).
const DUMP_INTERRUPTED: u16 = 0x10;
/// A dump is read again so often when it was interrupted.
const DUMP_ATTEMPTS: u32 = 8;
/// Between two of these, where another one has not ended.
const DUMP_PAUSE: Duration = Duration::from_millis(5);
/// `NLMSGERR_ATTR_MSG`
const EXTENDED_MESSAGE: u16 = 1;

/// Why the kernel did not do it.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
pub enum NetlinkError {
    /// It said why.
    #[error("{}{}", io::Error::from_raw_os_error(*errno), extended(message))]
    Refused {
        /// Positive.
        errno: i32,
        /// The kernel's own words, if it had any.
        message: String,
    },
    /// The tables changed faster than they could be read.
    #[error("the kernel's tables kept changing while they were read; it is tried again")]
    Interrupted,
    /// The socket is gone.
    #[error("the netlink socket was closed")]
    Closed,
}

impl NetlinkError {
    /// The errno, if the kernel gave one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            Self::Interrupted | Self::Closed => None,
        }
    }
}

fn extended(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" ({message})") }
}

/// A socket of the network namespace in which it was opened.
pub struct Netlink {
    handle: Handle,
    /// A socket has one dump at a time: the kernel refuses another (EBUSY).
    dumping: Mutex<()>,
    task: AbortHandle,
    writes: Arc<Writes>,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Netlink {
    /// Opens one; needs a tokio runtime. Changes are counted in `writes`.
    pub fn open(writes: Arc<Writes>) -> io::Result<Self> {
        let (mut connection, handle, _) = rtnetlink::new_connection_with_strict_check()?;
        connection.set_forward_ack(true);
        connection.set_forward_done(true);
        // Older kernels have no extended answers: the errno is enough then.
        let _ = connection.socket_mut().socket_mut().set_ext_ack(true);
        let _ = connection.socket_mut().socket_mut().set_cap_ack(true);
        let task = tokio::spawn(connection).abort_handle();
        Ok(Self { handle, dumping: Mutex::default(), task, writes })
    }

    /// All that the kernel answers. A table that does not exist is empty.
    pub async fn dump(&self, request: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        let _one = self.dumping.lock().await;
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(all) = self.dump_once(request.clone()).await? {
                return Ok(all);
            }
        }
        Err(NetlinkError::Interrupted)
    }

    async fn dump_once(
        &self,
        request: RouteNetlinkMessage,
    ) -> Result<Option<Vec<RouteNetlinkMessage>>, NetlinkError> {
        let mut message = NetlinkMessage::from(request);
        message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let mut answers = self.handle.clone().request(message).map_err(|_| NetlinkError::Closed)?;
        let mut all = Vec::new();
        let mut interrupted = false;
        while let Some(answer) = answers.next().await {
            interrupted |= answer.header.flags & DUMP_INTERRUPTED != 0;
            match answer.payload {
                NetlinkPayload::InnerMessage(inner) => all.push(inner),
                NetlinkPayload::Done(done) if done.code == 0 => return Ok((!interrupted).then_some(all)),
                NetlinkPayload::Done(done) if -done.code == libc::ENOENT => return Ok(Some(Vec::new())),
                NetlinkPayload::Done(done) => {
                    return Err(NetlinkError::Refused { errno: -done.code, message: String::new() });
                }
                NetlinkPayload::Error(error) if -error.raw_code() == libc::ENOENT => {
                    return Ok(Some(Vec::new()));
                }
                // Whoever wanted the last one waits for it no more, and it has not ended yet.
                NetlinkPayload::Error(error) if -error.raw_code() == libc::EBUSY => {
                    tokio::time::sleep(DUMP_PAUSE).await;
                    return Ok(None);
                }
                NetlinkPayload::Error(error) => return Err(refused(&error)),
                _ => interrupted = true,
            }
        }
        Err(NetlinkError::Closed)
    }

    /// Makes a change and waits for its acknowledgement. `flags` beside `NLM_F_REQUEST | NLM_F_ACK`.
    pub async fn change(&self, change: RouteNetlinkMessage, flags: u16) -> Result<(), NetlinkError> {
        self.writes.netlink();
        let mut message = NetlinkMessage::from(change);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut answers = self.handle.clone().request(message).map_err(|_| NetlinkError::Closed)?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload {
                return if error.code.is_none() { Ok(()) } else { Err(refused(&error)) };
            }
        }
        Err(NetlinkError::Closed)
    }

    /// All links by index.
    pub async fn links(&self) -> Result<Links, NetlinkError> {
        let all = self.dump(RouteNetlinkMessage::GetLink(LinkMessage::default())).await?;
        let links = all.into_iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => Link::parse(&link),
            _ => None,
        });
        Ok(Links(links.map(|link| (link.index, link)).collect()))
    }
}

pub(super) fn refused(error: &ErrorMessage) -> NetlinkError {
    // What follows the errno: the request's header (16 bytes, NETLINK_CAP_ACK), then attributes.
    let mut rest = error.header.get(16..).unwrap_or_default();
    let mut message = String::new();
    while let [l0, l1, k0, k1, ..] = *rest {
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let kind = u16::from_ne_bytes([k0, k1]);
        let Some(value) = rest.get(4..length) else { break };
        if kind == EXTENDED_MESSAGE {
            message = String::from_utf8_lossy(value).trim_end_matches('\0').to_owned();
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    NetlinkError::Refused { errno: error.raw_code().abs(), message }
}

/// A link as far as it concerns us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its alias.
    pub alias: Option<String>,
    /// Bytes.
    pub mtu: u32,
    /// IFF_UP
    pub up: bool,
    /// IFF_LOOPBACK
    pub loopback: bool,
    /// `net.ipv4.conf.<name>.rp_filter`
    pub rp_filter: Option<i32>,
}

impl Link {
    fn parse(message: &LinkMessage) -> Option<Self> {
        let mut name = None;
        let mut alias = None;
        let mut mtu = 0;
        let mut rp_filter = None;
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(text) => name = Some(text.clone()),
                LinkAttribute::IfAlias(text) => alias = Some(text.clone()),
                LinkAttribute::Mtu(bytes) => mtu = *bytes,
                LinkAttribute::AfSpecUnspec(families) => {
                    for family in families {
                        let AfSpecUnspec::Inet(parts) = family else { continue };
                        for part in parts {
                            if let AfSpecInet::DevConf(conf) = part {
                                rp_filter = Some(conf.rp_filter);
                            }
                        }
                    }
                }
                _ => {}
            }
        }
        Some(Self {
            index: message.header.index,
            name: name?,
            alias,
            mtu,
            up: message.header.flags.contains(LinkFlags::Up),
            loopback: message.header.link_layer_type == LinkLayerType::Loopback,
            rp_filter,
        })
    }

    /// The device number, if it is named `tombolo<n>`.
    pub fn device(&self) -> Option<DeviceNumber> {
        device_number(&self.name)
    }
}

/// The number in `tombolo<n>`, if the name is exactly that.
pub fn device_number(name: &str) -> Option<DeviceNumber> {
    let number = DeviceNumber::new(name.strip_prefix("tombolo")?.parse().ok()?)?;
    (number.link() == name).then_some(number)
}

/// Links by index.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Links(pub BTreeMap<u32, Link>);

impl Links {
    /// The link of a device.
    pub fn device(&self, number: DeviceNumber) -> Option<&Link> {
        self.0.values().find(|link| link.device() == Some(number))
    }

    /// The device behind an index.
    pub fn number(&self, index: u32) -> Option<DeviceNumber> {
        self.0.get(&index).and_then(Link::device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_names_are_ours() {
        assert_eq!(device_number("tombolo0"), DeviceNumber::new(0));
        assert_eq!(device_number("tombolo63"), DeviceNumber::new(63));
        for foreign in
            ["tombolo", "tombolo64", "tombolo01", "tombolo+1", "tombolo-1", "xtombolo1", "tombolo1x", "eth0"]
        {
            assert_eq!(device_number(foreign), None, "{foreign}");
        }
    }

    #[tokio::test]
    async fn several_dumps_at_once_are_all_answered() {
        let netlink = Netlink::open(Arc::default()).unwrap();
        let links = || netlink.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()));
        for _ in 0..20 {
            for result in futures::future::join_all((0..50).map(|_| links())).await {
                assert!(!result.unwrap().is_empty());
            }
            // One that nobody waits for.
            let mut left = Box::pin(links());
            let _ = futures::poll!(&mut left);
        }
    }
}
