//! ONE NODE, PURE. No socket, clock, task, file or OS randomness.
//!
//! A node is three machines: [`planner::Planner`] decides, [`outbound::Outbound`] and [`inbound::Inbound`] carry packets.
//! They talk only by [`io::Update`] and [`io::Notice`].

#[macro_use]
mod named;

pub mod alias;
pub mod aqm;
pub mod behind;
pub(crate) mod bucket;
pub mod carrier;
pub mod counters;
pub mod drops;
pub(crate) mod fit;
pub mod flows;
pub mod happened;
mod hold;
pub mod inbound;
pub mod io;
pub mod lifetime;
pub mod names;
pub mod netcheck;
pub mod outbound;
pub mod owners;
pub mod packet;
pub mod path;
pub mod peer;
pub(crate) mod peer_relay;
pub mod place;
pub mod planner;
pub mod portmap;
pub mod prefixes;
pub mod routes;
pub mod session;
pub mod steer;
pub(crate) mod timers;
pub mod traffic;

#[cfg(test)]
mod tests;
