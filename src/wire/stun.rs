//! The Binding subset of STUN (RFC 8489) with NAT behaviour discovery (RFC 5780), both directions, and a server side that
//! also answers RFC 3489 clients. stun-rs does the encoding and decoding of current messages; what it does not know (the
//! older protocol's headers and attributes) is done here.

use std::net::{IpAddr, SocketAddr};

use stun_rs::attributes::discovery::{ChangeRequest, ChangeRequestFlags, OtherAddress, ResponseOrigin};
use stun_rs::attributes::stun::{ErrorCode, Fingerprint, MappedAddress, UnknownAttributes, XorMappedAddress};
use stun_rs::methods::BINDING;
use stun_rs::{MessageClass, MessageDecoder, MessageEncoder, StunMessage, StunMessageBuilder};

/// The magic cookie at 4..8 of every STUN message (RFC 8489, section 5).
pub const MAGIC_COOKIE: [u8; 4] = [0x21, 0x12, 0xA4, 0x42];
/// Bytes of a STUN header (RFC 8489, section 5).
pub const HEADER: usize = 20;
/// The longest request that the server answers, in bytes: a message that fits any IPv4 path (RFC 8489, section 6.1).
pub const MAX_REQUEST: usize = 548;

/// Message types (RFC 8489, section 5).
pub(crate) mod kind {
    pub(crate) const BINDING_REQUEST: u16 = 0x0001;
    pub(crate) const BINDING_SUCCESS: u16 = 0x0101;
    pub(crate) const BINDING_ERROR: u16 = 0x0111;
}

/// Attribute types: RFC 8489 section 18.3, RFC 5780 section 7, RFC 3489 section 11.2.
pub(crate) mod attribute {
    pub(crate) const MAPPED_ADDRESS: u16 = 0x0001;
    pub(crate) const CHANGE_REQUEST: u16 = 0x0003;
    pub(crate) const SOURCE_ADDRESS: u16 = 0x0004;
    pub(crate) const CHANGED_ADDRESS: u16 = 0x0005;
    pub(crate) const USERNAME: u16 = 0x0006;
    pub(crate) const MESSAGE_INTEGRITY: u16 = 0x0008;
    pub(crate) const ERROR_CODE: u16 = 0x0009;
    pub(crate) const UNKNOWN_ATTRIBUTES: u16 = 0x000A;
    pub(crate) const MESSAGE_INTEGRITY_SHA256: u16 = 0x001C;
    pub(crate) const XOR_MAPPED_ADDRESS: u16 = 0x0020;
    pub(crate) const PADDING: u16 = 0x0026;
    pub(crate) const RESPONSE_PORT: u16 = 0x0027;
    pub(crate) const FINGERPRINT: u16 = 0x8028;

    /// Must be understood by whoever processes the message (RFC 8489, section 14).
    pub(crate) const fn is_required(kind: u16) -> bool {
        kind < 0x8000
    }
}

/// Ties a response to its request. Draw it at random.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransactionId(pub [u8; 12]);

/// From where a server is asked to answer (RFC 5780, section 7.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Change {
    /// From its other address.
    pub ip: bool,
    /// From its other port.
    pub port: bool,
}

/// A Binding request with FINGERPRINT, 28 or 36 bytes long.
#[must_use]
pub fn binding_request(txid: &TransactionId, change: Change) -> Vec<u8> {
    let mut message = StunMessageBuilder::new(BINDING, MessageClass::Request).with_transaction_id(txid.0.into());
    if change != Change::default() {
        message = message.with_attribute(change_request(change));
    }
    encode(&message.with_attribute(Fingerprint::default()).build()).unwrap_or_default()
}

/// A Binding request whose answer is to go to another port at the asker's address (RESPONSE-PORT, RFC 5780 section 7.5), with
/// FINGERPRINT; 36 bytes.
#[must_use]
pub fn request_to_port(txid: &TransactionId, port: u16) -> Vec<u8> {
    let mut message = Writer::current(kind::BINDING_REQUEST, txid);
    message.attribute(attribute::RESPONSE_PORT, &port.to_be_bytes());
    message.fingerprint();
    message.finish()
}

/// A server's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BindingResponse {
    /// Of the request.
    pub txid: TransactionId,
    /// Our address as the server saw it.
    pub mapped: SocketAddr,
    /// Where the server would have answered from, asked to change address and port (OTHER-ADDRESS, or CHANGED-ADDRESS
    /// of RFC 3489). Nothing guarantees that it makes sense.
    pub other: Option<SocketAddr>,
    /// Where the server says it answered from (RESPONSE-ORIGIN, or SOURCE-ADDRESS of RFC 3489).
    pub origin: Option<SocketAddr>,
}

/// Why bytes are no usable answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StunError {
    /// Not a STUN message, or its parts contradict each other.
    #[error("not a well-formed STUN message")]
    Malformed,
    /// The FINGERPRINT is wrong.
    #[error("the STUN fingerprint does not match")]
    BadFingerprint,
    /// Another message than a Binding response.
    #[error("not a STUN Binding response")]
    NotAResponse,
    /// The server refused.
    #[error("the STUN server answered with error {code}")]
    Refused {
        /// Of the request.
        txid: TransactionId,
        /// RFC 8489, section 18.5; 0 if it did not say.
        code: u16,
    },
    /// A success without an address that could be ours.
    #[error("the STUN server's answer holds no address")]
    NoAddress,
}

/// Reads a server's answer.
///
/// # Errors
/// See [`StunError`]. A missing FINGERPRINT is fine, a wrong one is not.
pub fn decode_binding_response(bytes: &[u8]) -> Result<BindingResponse, StunError> {
    let txid = transaction_id(bytes).ok_or(StunError::Malformed)?;
    if !is_well_formed(bytes) {
        return Err(StunError::Malformed);
    }
    if fingerprint(bytes) == Some(false) {
        return Err(StunError::BadFingerprint);
    }
    let (message, _) = MessageDecoder::default().decode(bytes).map_err(|_| StunError::Malformed)?;
    if message.method() != BINDING {
        return Err(StunError::NotAResponse);
    }
    match message.class() {
        MessageClass::SuccessResponse => {}
        MessageClass::ErrorResponse => {
            let code = message.get::<ErrorCode>().and_then(|a| a.as_error_code().ok());
            return Err(StunError::Refused { txid, code: code.map_or(0, |c| c.error_code().error_code()) });
        }
        MessageClass::Request | MessageClass::Indication => return Err(StunError::NotAResponse),
    }
    let xored = message.get::<XorMappedAddress>().and_then(|a| a.as_xor_mapped_address().ok());
    let plain = message.get::<MappedAddress>().and_then(|a| a.as_mapped_address().ok());
    let mapped = xored.map(|a| *a.socket_address()).or_else(|| plain.map(|a| *a.socket_address()));
    let mapped = mapped.map(canonical).filter(is_usable).ok_or(StunError::NoAddress)?;
    let other = message.get::<OtherAddress>().and_then(|a| a.as_other_address().ok()).map(|a| *a.socket_address());
    let origin = message.get::<ResponseOrigin>().and_then(|a| a.as_response_origin().ok()).map(|a| *a.socket_address());
    Ok(BindingResponse {
        txid,
        mapped,
        other: other.or_else(|| find(bytes, attribute::CHANGED_ADDRESS).and_then(read_address)).filter(is_usable),
        origin: origin.or_else(|| find(bytes, attribute::SOURCE_ADDRESS).and_then(read_address)).filter(is_usable),
    })
}

/// True for a Binding request with this id.
pub(crate) fn is_request_with(bytes: &[u8], txid: &TransactionId) -> bool {
    bytes.first_chunk::<2>() == Some(&kind::BINDING_REQUEST.to_be_bytes()) && transaction_id(bytes) == Some(*txid)
}

/// The transaction id of anything that has a STUN header.
#[must_use]
pub fn transaction_id(bytes: &[u8]) -> Option<TransactionId> {
    let header = bytes.first_chunk::<HEADER>()?;
    let (front, id) = header.split_at(8);
    (front[0] & 0xC0 == 0 && front[4..] == MAGIC_COOKIE).then_some(())?;
    id.try_into().ok().map(TransactionId)
}

/// The addresses a server answers on. With two of them that differ in both address and port it can offer
/// OTHER-ADDRESS; all four combinations are needed for every CHANGE-REQUEST.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServerLayout {
    /// Every socket of the server, as clients reach it.
    pub endpoints: Vec<SocketAddr>,
}

impl ServerLayout {
    /// The endpoint that differs from `from` exactly as asked.
    fn alternate(&self, from: SocketAddr, change: Change) -> Option<SocketAddr> {
        self.endpoints.iter().copied().find(|e| {
            e.is_ipv4() == from.is_ipv4()
                && (e.ip() != from.ip()) == change.ip
                && (e.port() != from.port()) == change.port
        })
    }

    /// What to offer as OTHER-ADDRESS: the endpoint that differs in both, or on a server with one address the other port
    /// (clients see that the address is the same).
    fn other(&self, from: SocketAddr) -> Option<SocketAddr> {
        self.alternate(from, Change { ip: true, port: true })
            .or_else(|| self.alternate(from, Change { ip: false, port: true }))
            .filter(is_usable)
    }
}

/// A datagram that the server sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The response.
    pub bytes: Vec<u8>,
    /// Which endpoint sends it.
    pub send_from: SocketAddr,
    /// To which port at the asker's address: the asker's own, if it did not ask for another.
    pub port: u16,
}

/// Answers a Binding request that came from `source` to the endpoint `received_on`. None: drop it. Nothing is remembered
/// between requests, and an answer on the wire is about twice as long as its request at most.
#[must_use]
pub fn answer(request: &[u8], source: SocketAddr, received_on: SocketAddr, layout: &ServerLayout) -> Option<Answer> {
    let source = canonical(source);
    let is_request = request.first_chunk::<2>() == Some(&kind::BINDING_REQUEST.to_be_bytes());
    if !is_request || request.len() > MAX_REQUEST || !is_well_formed(request) || !is_usable(&source) {
        return None;
    }
    if fingerprint(request) == Some(false) {
        return None;
    }
    if transaction_id(request).is_some() {
        answer_current(request, source, received_on, layout)
    } else {
        answer_classic(request, source, received_on, layout)
    }
}

/// RFC 8489 and RFC 5780.
fn answer_current(
    request: &[u8],
    source: SocketAddr,
    received_on: SocketAddr,
    layout: &ServerLayout,
) -> Option<Answer> {
    let has_fingerprint = fingerprint(request).is_some();
    let (message, _) = MessageDecoder::default().decode(request).ok()?;
    let finish = |builder: StunMessageBuilder, send_from| {
        let builder = if has_fingerprint { builder.with_attribute(Fingerprint::default()) } else { builder };
        encode(&builder.build()).map(|bytes| Answer { bytes, send_from, port: source.port() })
    };
    let refuse = |unknown: &[u16]| {
        let code = stun_rs::ErrorCode::new(420, "Unknown Attribute").ok()?;
        let builder = StunMessageBuilder::new(BINDING, MessageClass::ErrorResponse)
            .with_transaction_id(*message.transaction_id())
            .with_attribute(ErrorCode::from(code))
            .with_attribute(UnknownAttributes::from(unknown));
        finish(builder, received_on)
    };
    let unknown = not_understood(request);
    if !unknown.is_empty() {
        return refuse(&unknown);
    }
    let change =
        message.get::<ChangeRequest>().and_then(|a| a.as_change_request().ok()).map_or(Change::default(), |request| {
            Change {
                ip: request.flags().contains(ChangeRequestFlags::ChangeIp),
                port: request.flags().contains(ChangeRequestFlags::ChangePort),
            }
        });
    let send_from = if change == Change::default() {
        received_on
    } else {
        match layout.alternate(received_on, change) {
            Some(endpoint) => endpoint,
            None => return refuse(&[attribute::CHANGE_REQUEST]),
        }
    };
    let mut response = StunMessageBuilder::new(BINDING, MessageClass::SuccessResponse)
        .with_transaction_id(*message.transaction_id())
        .with_attribute(XorMappedAddress::from(source));
    if is_usable(&send_from) {
        response = response.with_attribute(ResponseOrigin::from(send_from));
    }
    if let Some(other) = layout.other(received_on) {
        response = response.with_attribute(OtherAddress::from(other));
    }
    let port = match find(request, attribute::RESPONSE_PORT) {
        Some(value) => value.first_chunk::<2>().map(|port| u16::from_be_bytes(*port)).filter(|port| *port != 0)?,
        None => source.port(),
    };
    finish(response, send_from).map(|answer| Answer { port, ..answer })
}

/// RFC 3489: no magic cookie, a transaction id of 16 bytes, addresses in the clear. Still spoken by Debian's `stun`.
/// RESPONSE-ADDRESS, which would let a request aim the answer at somebody else, is refused like any unknown attribute.
fn answer_classic(
    request: &[u8],
    source: SocketAddr,
    received_on: SocketAddr,
    layout: &ServerLayout,
) -> Option<Answer> {
    let id: [u8; 16] = request.get(4..HEADER)?.try_into().ok()?;
    if source.is_ipv6() {
        return None;
    }
    let unknown = not_understood(request);
    if !unknown.is_empty() {
        let mut list: Vec<u8> = unknown.iter().flat_map(|kind| kind.to_be_bytes()).collect();
        if unknown.len() % 2 == 1 {
            // This protocol has no padding; its list is made even by repeating one (RFC 3489, section 11.2.10).
            list.extend_from_slice(&list.clone()[list.len() - 2..]);
        }
        let mut message = Writer::new(kind::BINDING_ERROR, &id);
        message.attribute(attribute::ERROR_CODE, b"\0\0\x04\x14Unknown Attribute   ");
        message.attribute(attribute::UNKNOWN_ATTRIBUTES, &list);
        return Some(Answer { bytes: message.finish(), send_from: received_on, port: source.port() });
    }
    let flags = find(request, attribute::CHANGE_REQUEST).and_then(|v| v.first_chunk::<4>()).map_or(0, |v| v[3]);
    let change = Change { ip: flags & 4 != 0, port: flags & 2 != 0 };
    // Unable to do as asked it keeps silent: these clients take any answer for the one they asked for.
    let send_from = if change == Change::default() { received_on } else { layout.alternate(received_on, change)? };
    let mut message = Writer::new(kind::BINDING_SUCCESS, &id);
    message.address(attribute::MAPPED_ADDRESS, source);
    if is_usable(&send_from) {
        message.address(attribute::SOURCE_ADDRESS, send_from);
    }
    if let Some(other) = layout.other(received_on) {
        message.address(attribute::CHANGED_ADDRESS, other);
    }
    Some(Answer { bytes: message.finish(), send_from, port: source.port() })
}

/// The attributes of a request that the server must understand and does not, at most eight.
fn not_understood(request: &[u8]) -> Vec<u16> {
    let understood = |kind| {
        matches!(
            kind,
            attribute::CHANGE_REQUEST
                | attribute::RESPONSE_PORT
                | attribute::USERNAME
                | attribute::MESSAGE_INTEGRITY
                | attribute::MESSAGE_INTEGRITY_SHA256
        )
    };
    let mut unknown: Vec<u16> = Vec::new();
    for attribute in Attributes::of(request).flatten() {
        let kind = attribute.kind;
        if attribute::is_required(kind) && !understood(kind) && !unknown.contains(&kind) && unknown.len() < 8 {
            unknown.push(kind);
        }
    }
    unknown
}

fn change_request(change: Change) -> ChangeRequest {
    let ip = change.ip.then_some(ChangeRequestFlags::ChangeIp);
    let port = change.port.then_some(ChangeRequestFlags::ChangePort);
    ChangeRequest::new(Some(ip.into_iter().chain(port).collect()))
}

fn encode(message: &StunMessage) -> Option<Vec<u8>> {
    let mut buffer = [0; MAX_REQUEST];
    let len = MessageEncoder::default().encode(&mut buffer, message).ok()?;
    buffer.get(..len).map(<[u8]>::to_vec)
}

/// An IPv4 address seen through an IPv6 socket is an IPv4 address.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Something a datagram could be sent to.
pub(crate) const fn is_usable(address: &SocketAddr) -> bool {
    let multicast = match address.ip() {
        IpAddr::V4(ip) => ip.is_multicast() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_multicast(),
    };
    address.port() != 0 && !address.ip().is_unspecified() && !multicast
}

// ---- the format itself, for what stun-rs does not do ----

/// One attribute, and where it begins in the message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attribute<'a> {
    pub(crate) kind: u16,
    pub(crate) value: &'a [u8],
    pub(crate) at: usize,
}

/// Walks the attributes of a message. An attribute that does not fit yields None, and is the last item.
#[derive(Debug, Clone)]
pub(crate) struct Attributes<'a> {
    message: &'a [u8],
    at: usize,
}

impl<'a> Attributes<'a> {
    pub(crate) const fn of(message: &'a [u8]) -> Self {
        Self { message, at: HEADER }
    }

    fn read(&self) -> Option<(Attribute<'a>, usize)> {
        let rest = self.message.get(self.at..)?;
        let (header, rest) = rest.split_first_chunk::<4>()?;
        let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
        let padded = len.next_multiple_of(4);
        rest.get(..padded)?;
        let attribute =
            Attribute { kind: u16::from_be_bytes([header[0], header[1]]), value: rest.get(..len)?, at: self.at };
        Some((attribute, self.at + 4 + padded))
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Option<Attribute<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.message.len() {
            return None;
        }
        let read = self.read();
        self.at = read.map_or(self.message.len(), |(_, next)| next);
        Some(read.map(|(attribute, _)| attribute))
    }
}

/// True if the length field says how long the message is, and the attributes fill it exactly.
pub(crate) fn is_well_formed(message: &[u8]) -> bool {
    let Some(header) = message.first_chunk::<HEADER>() else { return false };
    let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
    header[0] & 0xC0 == 0 && len == message.len() - HEADER && Attributes::of(message).all(|a| a.is_some())
}

/// The value of the first attribute of this type.
pub(crate) fn find(message: &[u8], kind: u16) -> Option<&[u8]> {
    Attributes::of(message).flatten().find(|a| a.kind == kind).map(|a| a.value)
}

/// Whether the FINGERPRINT (which must be last) is right. None: there is none.
pub(crate) fn fingerprint(message: &[u8]) -> Option<bool> {
    let attribute = Attributes::of(message).flatten().find(|a| a.kind == attribute::FINGERPRINT)?;
    let before = message.get(..attribute.at)?;
    Some(attribute.at + 8 == message.len() && *attribute.value == fingerprint_of(before).to_be_bytes())
}

/// RFC 8489, section 14.7: the CRC-32 of the message before the attribute, xored so that it differs from a CRC that a
/// protocol around it may use.
fn fingerprint_of(before: &[u8]) -> u32 {
    let crc = before.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg()))
    });
    !crc ^ 0x5354_554E
}

/// A MAPPED-ADDRESS shaped value (RFC 8489, section 14.1).
fn read_address(value: &[u8]) -> Option<SocketAddr> {
    let (header, ip) = value.split_first_chunk::<4>()?;
    let port = u16::from_be_bytes([header[2], header[3]]);
    let ip = match header[1] {
        1 => IpAddr::from(<[u8; 4]>::try_from(ip).ok()?),
        2 => IpAddr::from(<[u8; 16]>::try_from(ip).ok()?),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// An XOR-MAPPED-ADDRESS value (RFC 8489, section 14.2) of the message with this header.
pub(crate) fn read_xor_address(value: &[u8], txid: &TransactionId) -> Option<SocketAddr> {
    let mut plain = value.to_vec();
    xor_address(&mut plain, &txid.0);
    read_address(&plain)
}

fn xor_address(value: &mut [u8], txid: &[u8]) {
    let mask = MAGIC_COOKIE[..2].iter().chain(&MAGIC_COOKIE).chain(txid);
    for (byte, mask) in value.iter_mut().skip(2).zip(mask) {
        *byte ^= mask;
    }
}

/// Writes a message attribute by attribute.
#[derive(Debug)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// `id` is the cookie and the transaction id.
    pub(crate) fn new(kind: u16, id: &[u8; 16]) -> Self {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&[0, 0]);
        bytes.extend_from_slice(id);
        Self { bytes }
    }

    /// A current message.
    pub(crate) fn current(kind: u16, txid: &TransactionId) -> Self {
        let mut id = [0; 16];
        id[..4].copy_from_slice(&MAGIC_COOKIE);
        id[4..].copy_from_slice(&txid.0);
        Self::new(kind, &id)
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Appends an attribute; `value` is at most 65,535 bytes.
    pub(crate) fn attribute(&mut self, kind: u16, value: &[u8]) {
        let len = u16::try_from(value.len()).unwrap_or(u16::MAX);
        let value = &value[..usize::from(len)];
        self.bytes.extend_from_slice(&kind.to_be_bytes());
        self.bytes.extend_from_slice(&len.to_be_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self.set_length(0);
    }

    pub(crate) fn address(&mut self, kind: u16, address: SocketAddr) {
        let value = address_value(address);
        self.attribute(kind, &value);
    }

    pub(crate) fn xor_address(&mut self, kind: u16, address: SocketAddr) {
        let mut value = address_value(address);
        xor_address(&mut value, &self.bytes[8..HEADER]);
        self.attribute(kind, &value);
    }

    /// Appends an attribute whose value depends on all bytes before it, with the length field counting it already.
    pub(crate) fn computed<const N: usize>(&mut self, kind: u16, value: impl FnOnce(&[u8]) -> [u8; N]) {
        self.set_length(4 + N);
        let value = value(&self.bytes);
        self.attribute(kind, &value);
    }

    pub(crate) fn fingerprint(&mut self) {
        self.computed(attribute::FINGERPRINT, |before| fingerprint_of(before).to_be_bytes());
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.bytes
    }

    fn set_length(&mut self, to_come: usize) {
        let len = u16::try_from(self.bytes.len() - HEADER + to_come).unwrap_or(u16::MAX);
        self.bytes[2..4].copy_from_slice(&len.to_be_bytes());
    }
}

fn address_value(address: SocketAddr) -> Vec<u8> {
    let family = if address.is_ipv4() { 1 } else { 2 };
    let mut value = vec![0, family];
    value.extend_from_slice(&address.port().to_be_bytes());
    match address.ip() {
        IpAddr::V4(ip) => value.extend_from_slice(&ip.octets()),
        IpAddr::V6(ip) => value.extend_from_slice(&ip.octets()),
    }
    value
}

#[cfg(test)]
mod tests;
