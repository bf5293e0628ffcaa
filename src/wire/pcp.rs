//! The MAP and ANNOUNCE messages of the Port Control Protocol, version 2 (RFC 6887): a router is asked to let the outside
//! reach one UDP port of this machine. Only IPv4 behind a NAT, and no options.
//!
//! ```text
//! request    0 version=2  1 opcode           2 0 0         4 lifetime (s)  8 client address, 16 bytes
//! answer     0 version=2  1 0x80 | opcode    2 0  3 result 4 lifetime (s)  8 epoch (s)  12 zero, 12 bytes
//! MAP, both 24 nonce, 12 bytes  36 protocol=17  37 0 0 0  40 internal port  42 external port  44 external address, 16 bytes
//! ```
//!
//! Numbers are big-endian, IPv4 addresses are written as IPv4-mapped IPv6 addresses.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4};

/// Where routers listen, for PCP and NAT-PMP (RFC 6887 section 19).
pub const SERVER_PORT: u16 = 5351;
/// Where routers send announcements to, multicast to 224.0.0.1, for PCP and NAT-PMP.
pub const CLIENT_PORT: u16 = 5350;
/// The longest message, in bytes (RFC 6887 section 7).
pub const MAX: usize = 1_100;
/// The version spoken here.
pub const VERSION: u8 = 2;

const HEADER: usize = 24;
const MAP: usize = 60;
const OPCODE_ANNOUNCE: u8 = 0;
const OPCODE_MAP: u8 = 1;
const RESPONSE: u8 = 0x80;
const UDP: u8 = 17;

/// Says whose mapping it is (RFC 6887 section 11.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nonce(pub [u8; 12]);

/// A wish for a mapping, or with a lifetime of 0 for its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// This machine's address as the router sees it.
    pub client: Ipv4Addr,
    /// The same for every request about this mapping.
    pub nonce: Nonce,
    /// The UDP port here.
    pub internal_port: u16,
    /// What the outside should be; zeros: no wish.
    pub suggested: SocketAddrV4,
    /// Seconds.
    pub lifetime_s: u32,
}

/// What a router says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// What it thinks of the request.
    pub result: ResultCode,
    /// Seconds that the mapping lasts, or that the error does.
    pub lifetime_s: u32,
    /// Seconds since the router forgot its mappings last (RFC 6887 section 8.5).
    pub epoch_s: u32,
    /// What it is about.
    pub about: About,
}

/// What an answer is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum About {
    /// Only the epoch: the answer to an ANNOUNCE, or one that was sent unasked.
    Announce,
    /// A mapping.
    Map {
        /// Of the request.
        nonce: Nonce,
        /// The UDP port inside.
        internal_port: u16,
        /// Where the outside reaches it; of an error, meaningless.
        external: SocketAddrV4,
    },
    /// An error that does not repeat the request, as servers of other versions send them.
    Unclear,
}

/// RFC 6887 section 7.4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResultCode(pub u8);

impl ResultCode {
    /// Done.
    pub const SUCCESS: Self = Self(0);
    /// The server speaks no PCP, or none of this version.
    pub const UNSUPPORTED_VERSION: Self = Self(1);
    /// Switched off by the router's owner, or the mapping is someone else's.
    pub const NOT_AUTHORIZED: Self = Self(2);
    /// The outside wished for is taken.
    pub const CANNOT_PROVIDE_EXTERNAL: Self = Self(11);

    /// In words.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self.0 {
            0 => "done",
            1 => "it does not speak this version",
            2 => "it does not allow it",
            3 | 6 => "it calls the request malformed",
            4 => "it makes no mappings",
            5 => "it does not know an option",
            7 => "it has no network itself",
            8 => "it is out of resources",
            9 => "it does not map UDP",
            10 => "this machine has too many mappings",
            11 => "it cannot give the outside address",
            12 => "there is a NAT between this machine and it",
            13 => "it takes no more filters",
            _ => "it gives an unknown error",
        }
    }
}

/// A MAP request, 60 bytes.
#[must_use]
pub fn map_request(wish: &Request) -> [u8; MAP] {
    let mut out = [0; MAP];
    header(&mut out, OPCODE_MAP, wish.lifetime_s, wish.client);
    out[24..36].copy_from_slice(&wish.nonce.0);
    out[36] = UDP;
    out[40..42].copy_from_slice(&wish.internal_port.to_be_bytes());
    out[42..44].copy_from_slice(&wish.suggested.port().to_be_bytes());
    out[44..60].copy_from_slice(&wish.suggested.ip().to_ipv6_mapped().octets());
    out
}

/// An ANNOUNCE request, 24 bytes: asks for the epoch.
#[must_use]
pub fn announce_request(client: Ipv4Addr) -> [u8; HEADER] {
    let mut out = [0; HEADER];
    header(&mut out, OPCODE_ANNOUNCE, 0, client);
    out
}

fn header(out: &mut [u8], opcode: u8, lifetime_s: u32, client: Ipv4Addr) {
    out[0] = VERSION;
    out[1] = opcode;
    out[4..8].copy_from_slice(&lifetime_s.to_be_bytes());
    out[8..24].copy_from_slice(&client.to_ipv6_mapped().octets());
}

/// Reads an answer; `None`: it is none, or about something never asked for.
#[must_use]
pub fn decode(bytes: &[u8]) -> Option<Answer> {
    if bytes.len() < HEADER || bytes.len() > MAX || bytes[0] != VERSION || bytes[1] & RESPONSE == 0 {
        return None;
    }
    let result = ResultCode(bytes[3]);
    let about = match bytes[1] & !RESPONSE {
        OPCODE_ANNOUNCE => About::Announce,
        OPCODE_MAP if bytes.len() >= MAP => {
            let external = Ipv6Addr::from(array::<16>(bytes, 44)?).to_ipv4_mapped();
            if bytes[36] != UDP {
                return None;
            }
            About::Map {
                nonce: Nonce(array(bytes, 24)?),
                internal_port: u16::from_be_bytes(array(bytes, 40)?),
                external: match external {
                    Some(ip) => SocketAddrV4::new(ip, u16::from_be_bytes(array(bytes, 42)?)),
                    None if result != ResultCode::SUCCESS => SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0),
                    // An IPv4 port that is reached by IPv6 (NAT64): of no use here.
                    None => return None,
                },
            }
        }
        OPCODE_MAP if result != ResultCode::SUCCESS => About::Unclear,
        _ => return None,
    };
    Some(Answer {
        result,
        lifetime_s: u32::from_be_bytes(array(bytes, 4)?),
        epoch_s: u32::from_be_bytes(array(bytes, 8)?),
        about,
    })
}

/// `N` bytes from `at`.
pub(super) fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NONCE: Nonce = Nonce([7; 12]);

    fn granted() -> Vec<u8> {
        let mut answer = vec![2, 0x81, 0, 0, 0, 0, 0x0e, 0x10, 0, 0, 1, 0];
        answer.extend([0; 12]);
        answer.extend(NONCE.0);
        answer.extend([17, 0, 0, 0, 0xc3, 0xc0, 0x12, 0x34]);
        answer.extend(Ipv4Addr::new(100, 64, 0, 9).to_ipv6_mapped().octets());
        answer
    }

    /// The figures of RFC 6887, sections 7.1 and 11.1, byte by byte.
    #[test]
    fn a_request_is_laid_out_as_the_rfc_says() {
        let wish = Request {
            client: "192.168.1.7".parse().unwrap(),
            nonce: NONCE,
            internal_port: 50_112,
            suggested: "0.0.0.0:50112".parse().unwrap(),
            lifetime_s: 7_200,
        };
        let mut expected = vec![2, 1, 0, 0, 0, 0, 0x1c, 0x20];
        expected.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 168, 1, 7]);
        expected.extend([7; 12]);
        expected.extend([17, 0, 0, 0, 0xc3, 0xc0, 0xc3, 0xc0]);
        expected.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0]);
        assert_eq!(map_request(&wish).as_slice(), expected);
        assert_eq!(announce_request(wish.client)[..8], [2, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn an_answer_is_read() {
        let answer = decode(&granted()).unwrap();
        assert_eq!((answer.result, answer.lifetime_s, answer.epoch_s), (ResultCode::SUCCESS, 3_600, 256));
        let external = "100.64.0.9:4660".parse().unwrap();
        assert_eq!(answer.about, About::Map { nonce: NONCE, internal_port: 50_112, external });
        let announced = decode(&[&[2, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5][..], &[0; 12]].concat()).unwrap();
        assert_eq!((announced.about, announced.epoch_s), (About::Announce, 5));
        let mut short = granted()[..24].to_vec();
        assert_eq!(decode(&short), None, "a success without a mapping");
        short[3] = 1;
        assert_eq!(decode(&short).unwrap().about, About::Unclear);
        let mut request = granted();
        request[1] = 1;
        assert_eq!(decode(&request), None, "a request");
        let mut six = granted();
        six[44] = 0x20;
        assert_eq!(decode(&six), None, "an IPv6 address");
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..1_200)) {
            let _ = decode(&bytes);
        }

        #[test]
        fn any_damage_is_survived(at in 0usize..60, to in any::<u8>(), cut in 0usize..61) {
            let mut bytes = granted();
            bytes[at] = to;
            bytes.truncate(cut);
            let _ = decode(&bytes);
        }
    }
}
