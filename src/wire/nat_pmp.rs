//! The NAT Port Mapping Protocol (RFC 6886), which routers spoke before PCP, on the same port.
//!
//! ```text
//! request   address   0 version=0  1 opcode=0
//!           map UDP   0 version=0  1 opcode=1    2 0 0     4 internal port  6 external port  8 lifetime (s)
//! answer    address   0 version=0  1 opcode=128  2 result  4 epoch (s)      8 external address
//!           map UDP   0 version=0  1 opcode=129  2 result  4 epoch (s)      8 internal port 10 external port 12 lifetime (s)
//! ```

use std::net::Ipv4Addr;

use crate::wire::pcp::array;

const ADDRESS: u8 = 0;
const MAP_UDP: u8 = 1;
const RESPONSE: u8 = 128;

/// What a router says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// What it thinks of the request.
    pub result: ResultCode,
    /// Seconds since the router forgot its mappings last (RFC 6886 section 3.6).
    pub epoch_s: u32,
    /// What it is about.
    pub about: About,
}

/// What an answer is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum About {
    /// The router's outside address; of an error, zeros. Also sent unasked when it changes.
    Address(Ipv4Addr),
    /// A mapping.
    Map {
        /// The UDP port inside.
        internal_port: u16,
        /// The port outside.
        external_port: u16,
        /// Seconds it lasts.
        lifetime_s: u32,
    },
    /// An error that does not repeat the request: what a server says to PCP if it only knows NAT-PMP.
    Unclear,
}

/// RFC 6886 section 3.5.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResultCode(pub u16);

impl ResultCode {
    /// Done.
    pub const SUCCESS: Self = Self(0);

    /// In words.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self.0 {
            0 => "done",
            1 => "it does not speak this version",
            2 => "it does not allow it",
            3 => "it has no network itself",
            4 => "it is out of resources",
            5 => "it does not know the request",
            _ => "it gives an unknown error",
        }
    }
}

/// Asks for the outside address, 2 bytes.
#[must_use]
pub const fn address_request() -> [u8; 2] {
    [0, ADDRESS]
}

/// Asks for a mapping of a UDP port, 12 bytes. A lifetime of 0, with an external port of 0, ends it.
#[must_use]
pub fn map_request(internal_port: u16, external_port: u16, lifetime_s: u32) -> [u8; 12] {
    let mut out = [0; 12];
    out[1] = MAP_UDP;
    out[4..6].copy_from_slice(&internal_port.to_be_bytes());
    out[6..8].copy_from_slice(&external_port.to_be_bytes());
    out[8..12].copy_from_slice(&lifetime_s.to_be_bytes());
    out
}

/// Reads an answer; `None`: it is none.
#[must_use]
pub fn decode(bytes: &[u8]) -> Option<Answer> {
    if *bytes.first()? != 0 || *bytes.get(1)? < RESPONSE {
        return None;
    }
    let result = ResultCode(u16::from_be_bytes(array(bytes, 2)?));
    let epoch_s = u32::from_be_bytes(array(bytes, 4)?);
    let about = match (bytes[1] - RESPONSE, result) {
        (ADDRESS, ResultCode::SUCCESS) => About::Address(Ipv4Addr::from(array::<4>(bytes, 8)?)),
        (MAP_UDP, ResultCode::SUCCESS) => About::Map {
            internal_port: u16::from_be_bytes(array(bytes, 8)?),
            external_port: u16::from_be_bytes(array(bytes, 10)?),
            lifetime_s: u32::from_be_bytes(array(bytes, 12)?),
        },
        (_, ResultCode::SUCCESS) => return None,
        // The rest of an error may be missing.
        (ADDRESS, _) if bytes.len() == 12 => About::Address(Ipv4Addr::UNSPECIFIED),
        (MAP_UDP, _) if bytes.len() == 16 => {
            About::Map { internal_port: u16::from_be_bytes(array(bytes, 8)?), external_port: 0, lifetime_s: 0 }
        }
        _ => About::Unclear,
    };
    Some(Answer { result, epoch_s, about })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The figures of RFC 6886, sections 3.2 and 3.3.
    #[test]
    fn messages_are_laid_out_as_the_rfc_says() {
        assert_eq!(address_request(), [0, 0]);
        assert_eq!(map_request(0xc3c0, 0x1234, 7_200), [0, 1, 0, 0, 0xc3, 0xc0, 0x12, 0x34, 0, 0, 0x1c, 0x20]);
        let address = decode(&[0, 128, 0, 0, 0, 0, 1, 0, 203, 0, 113, 7]).unwrap();
        assert_eq!((address.epoch_s, address.about), (256, About::Address(Ipv4Addr::new(203, 0, 113, 7))));
        let map = decode(&[0, 129, 0, 0, 0, 0, 0, 9, 0xc3, 0xc0, 0x12, 0x34, 0, 0, 0x0e, 0x10]).unwrap();
        assert_eq!(map.about, About::Map { internal_port: 0xc3c0, external_port: 0x1234, lifetime_s: 3_600 });
    }

    #[test]
    fn errors_are_read_also_when_cut_short() {
        // What a server without PCP says to PCP (RFC 6887, appendix A).
        let old = decode(&[0, 129, 0, 1, 0, 0, 0, 9]).unwrap();
        assert_eq!((old.result, old.about), (ResultCode(1), About::Unclear));
        let refused = decode(&[0, 129, 0, 2, 0, 0, 0, 9, 0xc3, 0xc0, 0, 0, 0, 0, 0, 0]).unwrap();
        assert_eq!(refused.about, About::Map { internal_port: 0xc3c0, external_port: 0, lifetime_s: 0 });
        assert_eq!(decode(&[0, 129, 0, 0, 0, 0, 0, 9]), None, "a success without a mapping");
        assert_eq!(decode(&[0, 1, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0]), None, "a request");
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let _ = decode(&bytes);
        }

        #[test]
        fn any_answer_of_version_0_is_survived(kind in 120u8..140, bytes in proptest::collection::vec(any::<u8>(), 0..20)) {
            let _ = decode(&[&[0, kind][..], &bytes].concat());
        }
    }
}
