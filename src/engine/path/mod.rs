//! How a peer can be reached directly.
//!
//! A direct path is found in a *round*. The caller sends its candidates through the relay (`call`), the other side
//! answers with its own (`answer`), and the caller says `go` and starts half a round trip later, so that both sides'
//! first probes leave within a few milliseconds of each other. That matters: a probe that reaches a Linux router whose
//! own host behind it has not sent yet can claim the port pair there, and the punch then fails for good. (DCUtR of
//! libp2p synchronises the same way.)
//!
//! A path is promoted only by our own probe of data size that was answered at data size, and demoted only by evidence.

pub mod agent;
pub mod candidate;
pub mod ports;
pub mod reason;
pub mod reflexive;
