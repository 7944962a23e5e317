//! What one party, broker or member, knows of every cluster, and the session that exchanges it. Sans-IO: no
//! clock, no randomness, no runtime. Everything from outside is verified here before it counts.
//!
//! # The loop a shell writes
//!
//! One [`Replica`] behind a lock; one [`Session`] for each connection. After anything that may have changed the
//! replica (a handled message, [`Replica::publish`], [`Replica::set_interest`], [`Replica::offer_documents`])
//! wake every session's task. Each task:
//!
//! ```text
//! let mut session = Session::new(Introduction { version, features, membership });
//! loop {
//!     while the transport takes another message {          // a queue of a few messages, never more
//!         match session.poll_transmit(&replica) {
//!             Some(message) => send(wire::encode_message(&message)),
//!             None => break,
//!         }
//!     }
//!     wait for any of:
//!         the transport takes messages again, or the replica's version() grew: go round
//!         a message came: if let Some(message) = wire::decode_message(&pb)? {
//!             // a broker judges the first one, Hello, against the peer's TLS key before it goes on
//!             session.handle_message(&mut replica, message)?;      // Err: end this session
//!             log session.take_refusals();
//!         }
//!         the stream ended: drop the session; the replica keeps all it has
//! }
//! ```
//!
//! A session holds no queue of changes: it remembers how far the peer is with each origin and makes the next
//! message when it is asked for one, so that a slow receiver is told the newest value, later, and holds back
//! nobody else. Nothing is withdrawn because a session ends.
//!
//! A member publishes by [`LocalOrigin`]: `if local.set_records(..) { replica.publish(local.sign(key, position))? }`,
//! and looks at [`Replica::own_seen`]: a position above its own there means that it must take a higher epoch.
#![forbid(unsafe_code)]

mod document;
mod history;
mod local;
mod origin;
mod quota;
mod records;
mod refusal;
mod replica;
mod session;
mod set_file;

pub use local::{LocalOrigin, LocalStatement};
pub use origin::{OriginState, verify_nodes};
pub use quota::{Interest, Quota};
pub use records::ScopeRecords;
pub use refusal::{Object, Reason, Refusal};
pub use replica::{Change, Replica};
pub use session::{Introduction, Session, SessionError};
pub use set_file::{SetFile, SetFileError};
