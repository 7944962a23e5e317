//! A broker that lies, in the place of the honest one, with its key.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use tokio::runtime::Runtime;
use tombolo_broker::store::{Batch, Store, StoreError, Stored};
use tombolo_broker::{Broker, Config, Hooks, Outbound, config};
use tombolo_lab::{Lab, program};
use tombolo_replica::Quota;

use crate::mallory::runtime;

/// A broker in this process, in a broker's place.
pub struct Evil {
    runtime: Option<Runtime>,
    _broker: Broker,
}

impl Evil {
    /// Ends the honest broker and takes over: its address, its key, and nothing of its store.
    pub fn replace(lab: &Lab, place: &str, outbound: Arc<Outbound>) -> Result<Self> {
        lab.kill(place, "broker")?;
        let state = lab.state_dir(place);
        let config = Config {
            listen: SocketAddr::from(([0u16; 8], program::BROKER_PORT)),
            admin: Some(program::BROKER_ADMIN.parse()?),
            identity: config::read_identity(&state.join(program::BROKER_KEY))?,
            set: config::read_set(&state.join(program::BROKER_SET))?,
            quota: Quota { nodes: 1 << 20, records: 1 << 20, bytes: 1 << 30, ..Quota::default() },
        };
        let runtime = runtime(lab, place)?;
        let start = Broker::start(config, Box::new(Nothing), Hooks { outbound: Some(outbound) });
        let task = runtime.spawn(start);
        let broker = std::thread::scope(|scope| scope.spawn(|| runtime.handle().block_on(task)).join());
        let broker = broker.ok().context("the broker panicked")???;
        Ok(Self { runtime: Some(runtime), _broker: broker })
    }

    /// One that lets everything pass: it takes from members whatever there may be of it, and passes it on as it is.
    pub fn accomplice(lab: &Lab) -> Result<Self> {
        Self::replace(lab, "broker", Arc::new(|_, message| vec![message]))
    }
}

impl Drop for Evil {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Remembers nothing.
struct Nothing;

impl Store for Nothing {
    fn load(&mut self) -> Result<Stored, StoreError> {
        Ok(Stored::default())
    }

    fn write(&mut self, _: &Batch) -> Result<(), StoreError> {
        Ok(())
    }
}
