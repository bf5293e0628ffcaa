//! BYTES ↔ TYPES. No state. Decoding never panics, whatever arrives.

pub mod classify;
pub mod control;
pub mod fragment;
pub mod framed;
pub mod hook;
pub mod ip;
pub mod keys;
pub mod local;
pub mod mss;
pub mod nat;
pub mod nat_pmp;
pub mod offload;
pub mod pcp;
pub mod peer;
pub mod probe;
pub mod relay;
pub mod relay_udp;
pub mod renumber;
pub mod same_lan;
pub mod siphash;
pub mod stun;
pub mod upnp;
pub mod version;
pub mod wireguard;
pub mod xml;
