//! SYSTEM CALLS. The only place with `unsafe`, and the only producer of [`crate::time::Now`].
//!
//! Every file wraps one kernel facility in a type whose errors are named, so that the code above never looks at an
//! `errno`. Packet sources and sinks are batch-shaped: one call moves what is there.

#![allow(clippy::disallowed_methods, clippy::disallowed_types)]
// The kernel's enumerations are open-ended: what is not asked for is passed over.
#![allow(clippy::wildcard_enum_match_arm)]

pub mod clock;
pub mod extra;
pub mod hops;
pub mod lan;
pub mod lock;
pub mod manager;
pub mod mark;
pub mod netlink;
pub mod process;
pub mod router;
pub mod server_socket;
pub mod streams;
pub mod train;
pub mod tun;
pub mod udp;
pub mod wake;
