//! Datagrams in a TCP connection between two nodes: each preceded by its length in two bytes, big-endian (RFC 4571 section 2).
//!
//! ```text
//! length (2) | datagram | length (2) | datagram | …
//! ```
//!
//! What the datagrams are is told by their first bytes, as on UDP. One of no bytes is a mistake of the sender.

use std::ops::Range;

/// Bytes in front of each datagram.
pub const HEAD: usize = 2;

/// Appends a datagram. False: it is too long, or empty, and nothing was appended.
#[must_use]
pub fn push(datagram: &[u8], to: &mut Vec<u8>) -> bool {
    match u16::try_from(datagram.len()) {
        Ok(len) if len > 0 => {
            to.extend_from_slice(&len.to_be_bytes());
            to.extend_from_slice(datagram);
            true
        }
        _ => false,
    }
}

/// The other side does not keep to this, or to what it may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a datagram of {0} bytes is announced in the stream")]
pub struct BadLength(pub usize);

/// Where the whole datagrams in `bytes` are, and how many bytes they take with their lengths; what follows is the beginning of
/// one that has not come completely.
///
/// # Errors
/// One is announced that is empty or longer than `most`.
pub fn split(bytes: &[u8], most: usize, whole: &mut Vec<Range<usize>>) -> Result<usize, BadLength> {
    let mut at = 0;
    while let Some(head) = bytes.get(at..).and_then(|rest| rest.first_chunk::<HEAD>()) {
        let len = usize::from(u16::from_be_bytes(*head));
        if len == 0 || len > most {
            return Err(BadLength(len));
        }
        let place = at + HEAD..at + HEAD + len;
        if bytes.len() < place.end {
            break;
        }
        at = place.end;
        whole.push(place);
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_bytes_are_those_of_rfc_4571() {
        let mut stream = Vec::new();
        assert!(push(b"abc", &mut stream) && push(b"d", &mut stream));
        assert_eq!(stream, b"\x00\x03abc\x00\x01d");
        assert!(!push(b"", &mut stream) && !push(&vec![0; 65_536], &mut stream));
        assert_eq!(stream.len(), 8);
    }

    #[test]
    fn lengths_that_cannot_be_are_refused() {
        let mut whole = Vec::new();
        assert_eq!(split(b"\x00\x00", 10, &mut whole), Err(BadLength(0)));
        assert_eq!(split(b"\x00\x01x\x00\x0b", 10, &mut whole), Err(BadLength(11)));
        assert_eq!(split(b"\x00", 10, &mut whole), Ok(0));
    }

    proptest! {
        /// However a stream is cut into reads, the same datagrams come out, in order.
        #[test]
        fn any_cutting_gives_the_same(
            datagrams in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 0..12),
            cuts in prop::collection::vec(1..30usize, 0..60),
        ) {
            let mut stream = Vec::new();
            for datagram in &datagrams {
                prop_assert!(push(datagram, &mut stream));
            }
            let (mut got, mut buffer, mut rest) = (Vec::new(), Vec::new(), &stream[..]);
            let mut cuts = cuts.into_iter();
            while !rest.is_empty() {
                let (now, later) = rest.split_at(cuts.next().unwrap_or(rest.len()).min(rest.len()));
                rest = later;
                buffer.extend_from_slice(now);
                let mut whole = Vec::new();
                let used = split(&buffer, 100, &mut whole).unwrap();
                got.extend(whole.into_iter().map(|place| buffer[place].to_vec()));
                buffer.drain(..used);
            }
            prop_assert!(buffer.is_empty());
            prop_assert_eq!(got, datagrams);
        }

        /// No bytes can make it panic or go beyond what is there.
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400), most in 1..300usize) {
            let mut whole = Vec::new();
            if let Ok(used) = split(&bytes, most, &mut whole) {
                prop_assert!(used <= bytes.len());
            }
            for place in whole {
                prop_assert!(place.end <= bytes.len() && place.len() <= most);
            }
        }
    }
}
