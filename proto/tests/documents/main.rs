//! The signed formats, from outside: what may be believed, and what must not be.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod chain;
mod effective;
mod invitation;
mod roundtrip;
mod tree;
mod vector;
