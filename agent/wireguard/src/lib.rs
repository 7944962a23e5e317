//! A userspace WireGuard device.
//!
//! `tombolo-wireguard NAME` is one device with one standard UAPI socket, so that `wg` and `wg-quick` work with it.
//! It is two processes: the [`supervisor`] holds the TUN, the UDP sockets, the UAPI listener and the last
//! configuration in memory, and a [`worker`], one thread that runs each packet to completion, does everything else.
//! A worker that dies is restarted at once and goes on from what is held. `tombolo-wireguard serve` keeps one device
//! for each file in a directory ([`serve`]).

#![deny(unsafe_code)]

pub mod allowed;
pub mod checksum;
pub mod coalesce;
pub mod daemon;
pub mod device;
pub mod elder;
pub mod identity;
pub mod key;
pub mod limiter;
pub mod link;
pub mod name;
pub mod noise;
pub mod offload;
pub mod outbox;
pub mod packet;
pub mod segment;
pub mod serve;
pub mod server;
pub mod stamp;
pub mod supervisor;
#[expect(unsafe_code, reason = "ioctl on interfaces")]
pub mod tun;
pub mod uapi;
pub mod udp;
pub mod vnet;
pub mod worker;
