//! Superpackets: one packet of up to 64 KiB in the place of many packets of one flow.
//!
//! A kernel with segmentation offload hands a TUN reader what an application wrote in one piece, with headers as if it
//! were one packet, and takes the same from a writer. Ten bytes in front (`struct virtio_net_hdr`, virtio 1.2 section
//! 5.1.6) say how it is to be cut. [`cut`] cuts, [`Merger`] merges. Neither copies payload: cutting writes each packet's
//! headers into the buffer right in front of its payload, over the end of the payload before, which has been used by then;
//! merging names the pieces that one vectored write puts together.
//!
//! What comes out of a cut is what the flow's sender would have sent without offload, and only packets are merged that
//! a cut gives back byte for byte (but for the IPv4 identification of packets that must not be fragmented, which means
//! nothing: RFC 6864 section 4.1).

use std::ops::Range;

use crate::wire::ip::transport;

/// Bytes of the header in front.
pub const HEADER: usize = 10;
/// The longest superpacket: what the length field of IPv4 can say.
pub const MAX_SUPERPACKET: usize = 65_535;
/// Most packets in one: what Linux takes for UDP (`UDP_MAX_SEGMENTS`).
pub const MAX_PACKETS: usize = 64;
/// The longest IP and transport headers of a superpacket. Without extension headers, 120 bytes are the most.
const MAX_HEADERS: usize = 256;

const NEEDS_CHECKSUM: u8 = 1;
const NONE: u8 = 0;
const TCP4: u8 = 1;
const TCP6: u8 = 4;
const UDP: u8 = 5;
/// Set beside TCP4 or TCP6 when the superpacket has CWR set.
const ECN: u8 = 0x80;

const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;

// Offsets in a TCP header, RFC 9293 section 3.1, and in a UDP header, RFC 768.
const TCP_FLAGS: usize = 13;
const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const ECE: u8 = 0x40;
const CWR: u8 = 0x80;

/// How a packet handed over by the kernel is to be completed and cut. The default is an ordinary, complete packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offload {
    flags: u8,
    kind: u8,
    header_len: u16,
    size: u16,
    checksum_start: u16,
    checksum_offset: u16,
}

impl Offload {
    /// Reads the header; its numbers are in the machine's own byte order.
    #[must_use]
    pub const fn decode(bytes: &[u8; HEADER]) -> Self {
        let [flags, kind, a, b, c, d, e, f, g, h] = *bytes;
        Self {
            flags,
            kind,
            header_len: u16::from_ne_bytes([a, b]),
            size: u16::from_ne_bytes([c, d]),
            checksum_start: u16::from_ne_bytes([e, f]),
            checksum_offset: u16::from_ne_bytes([g, h]),
        }
    }

    /// Writes the header.
    #[must_use]
    pub const fn encode(&self) -> [u8; HEADER] {
        let ([a, b], [c, d]) = (self.header_len.to_ne_bytes(), self.size.to_ne_bytes());
        let ([e, f], [g, h]) = (self.checksum_start.to_ne_bytes(), self.checksum_offset.to_ne_bytes());
        [self.flags, self.kind, a, b, c, d, e, f, g, h]
    }

    /// The checksum above IP is not complete: it holds the sum over the pseudo header.
    #[must_use]
    pub const fn is_partial(&self) -> bool {
        self.flags & NEEDS_CHECKSUM != 0
    }

    /// This is more than one packet.
    #[must_use]
    pub const fn is_super(&self) -> bool {
        self.kind != NONE
    }
}

/// Why a superpacket cannot be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadSuper {
    /// A kind of segmentation that was not asked for.
    #[error("a kind of superpacket that was not asked for")]
    Kind,
    /// Its headers are cut off, too long, or not of the kind it says.
    #[error("the headers are not those of such a superpacket")]
    Headers,
    /// The packets in it would have no payload, or it has none.
    #[error("no size to cut to")]
    Size,
    /// Its packets are larger than allowed and of a protocol that does not bear another size.
    #[error("its packets are too long for the path")]
    TooLong,
}

/// Makes a complete TCP packet one that can be cut as if it were a superpacket, for a path that does not take it whole.
/// None: it is something else, its receiver must see it in one piece (SYN, RST, URG), its addresses are not those its
/// checksum is made with (a routing header), or its checksum is wrong, which must not be put right.
pub fn tcp_as_superpacket(packet: &mut [u8]) -> Option<Offload> {
    const IN_ONE_PIECE: u8 = 0x02 | 0x04 | 0x20;
    const ROUTING: u8 = 43;
    let (PROTOCOL_TCP, l4) = transport(packet)? else { return None };
    let v6 = packet[0] >> 4 == 6;
    let header = packet.get(l4..)?.first_chunk::<20>()?;
    let flags = header[TCP_FLAGS];
    let headers = l4 + usize::from(header[12] >> 4) * 4;
    let payload = packet.len().checked_sub(headers).filter(|payload| *payload > 0 && headers >= l4 + 20)?;
    let kind = if v6 { TCP6 } else { TCP4 };
    let routed = v6 && (packet[6] == ROUTING || (l4 > 40 && packet[40] == ROUTING));
    if flags & IN_ONE_PIECE != 0 || routed || !checksum_is_right(packet, &Shape { kind, l4, ..Shape::default() }) {
        return None;
    }
    let addresses = if v6 { 8..40 } else { 12..20 };
    let pseudo = fold(sum(&packet[addresses]) + word([0, PROTOCOL_TCP]) + word(be(packet.len() - l4))).to_ne_bytes();
    packet[l4 + TCP_CHECKSUM..l4 + TCP_CHECKSUM + 2].copy_from_slice(&pseudo);
    Some(Offload {
        flags: NEEDS_CHECKSUM,
        kind: kind | if flags & CWR != 0 { ECN } else { 0 },
        header_len: small(headers),
        size: small(payload),
        checksum_start: small(l4),
        checksum_offset: small(TCP_CHECKSUM),
    })
}

/// Completes the checksum of an ordinary packet.
///
/// # Errors
/// The header names a place outside the packet.
pub fn complete(offload: &Offload, packet: &mut [u8]) -> Result<(), BadSuper> {
    if offload.flags & NEEDS_CHECKSUM == 0 {
        return Ok(());
    }
    let start = usize::from(offload.checksum_start);
    let at = start + usize::from(offload.checksum_offset);
    // The field holds the sum over the pseudo header, so summing it too is right.
    let sum = sum(packet.get(start..).ok_or(BadSuper::Headers)?);
    let field = packet.get_mut(at..at + 2).ok_or(BadSuper::Headers)?;
    field.copy_from_slice(&if offload.checksum_offset == 6 { udp_checksum(sum) } else { checksum(sum) });
    Ok(())
}

/// Cuts a superpacket into packets of its own size, or with TCP so that none is longer than `longest` bytes.
///
/// # Errors
/// [`BadSuper`]. Nothing was changed then.
pub fn cut<'a>(offload: &Offload, packet: &'a mut [u8], longest: usize) -> Result<Cut<'a>, BadSuper> {
    let (is_tcp, is_v6) = match offload.kind & !ECN {
        TCP4 => (true, false),
        TCP6 => (true, true),
        UDP => (false, packet.first().is_some_and(|b| b >> 4 == 6)),
        _ => return Err(BadSuper::Kind),
    };
    let l4 = usize::from(offload.checksum_start);
    let checksum_at = if is_tcp { TCP_CHECKSUM } else { UDP_CHECKSUM };
    let (version, least) = if is_v6 { (6, 40) } else { (4, 20) };
    if offload.flags & NEEDS_CHECKSUM == 0
        || usize::from(offload.checksum_offset) != checksum_at
        || packet.first().is_none_or(|b| b >> 4 != version)
        || l4 < least
        || (!is_v6 && l4 != usize::from(packet[0] & 0x0F) * 4)
    {
        return Err(BadSuper::Headers);
    }
    let l4_len = match is_tcp {
        true => usize::from(packet.get(l4 + 12).ok_or(BadSuper::Headers)? >> 4) * 4,
        false => 8,
    };
    let headers = l4 + l4_len;
    if (is_tcp && l4_len < 20) || headers > MAX_HEADERS || packet.len() < headers || packet.len() > MAX_SUPERPACKET {
        return Err(BadSuper::Headers);
    }
    let mut size = usize::from(offload.size);
    if size == 0 || packet.len() == headers {
        return Err(BadSuper::Size);
    }
    if headers + size.min(packet.len() - headers) > longest {
        if !is_tcp || longest <= headers {
            return Err(BadSuper::TooLong);
        }
        size = longest - headers;
    }
    let mut template = [0; MAX_HEADERS];
    template[..headers].copy_from_slice(&packet[..headers]);
    // What differs from packet to packet is left out of the sums and added for each.
    let ip_sum = if is_v6 {
        0
    } else {
        template[2..6].fill(0);
        template[10..12].fill(0);
        sum(&template[..l4])
    };
    // The checksum field holds the sum over the pseudo header with the length of the whole. Whose addresses it was made
    // with need not be known: with a routing header they are not those in front.
    let field = l4 + checksum_at..l4 + checksum_at + 2;
    let pseudo = sum(&packet[field.clone()]) + u64::from(!fold(word(be(packet.len() - l4))));
    template[field].fill(0);
    let flags = template[l4 + TCP_FLAGS];
    if is_tcp {
        template[l4 + 4..l4 + 8].fill(0);
        template[l4 + TCP_FLAGS] = 0;
    } else {
        template[l4 + 4..l4 + 6].fill(0);
    }
    let l4_sum = pseudo + sum(&template[l4..headers]);
    Ok(Cut {
        first_id: u16::from_be_bytes([packet[4], packet[5]]),
        first_sequence: u32::from_be_bytes([packet[l4 + 4], packet[l4 + 5], packet[l4 + 6], packet[l4 + 7]]),
        packet,
        template,
        headers,
        l4,
        is_tcp,
        is_v6,
        flags,
        size,
        ip_sum,
        l4_sum,
        done: 0,
        number: 0,
    })
}

/// The packets of a superpacket, one after the other. Each is valid until the next is asked for.
#[derive(Debug)]
pub struct Cut<'a> {
    packet: &'a mut [u8],
    template: [u8; MAX_HEADERS],
    headers: usize,
    l4: usize,
    is_tcp: bool,
    is_v6: bool,
    flags: u8,
    first_id: u16,
    first_sequence: u32,
    size: usize,
    ip_sum: u64,
    l4_sum: u64,
    /// Bytes of payload that were handed out.
    done: usize,
    number: u16,
}

impl Cut<'_> {
    /// Inner bytes that the largest packet has.
    #[must_use]
    pub const fn longest(&self) -> usize {
        self.headers + self.size
    }

    /// The next packet, complete with lengths, numbers and checksums.
    #[expect(clippy::should_implement_trait, reason = "each packet borrows from this; an iterator could not do that")]
    pub fn next(&mut self) -> Option<&[u8]> {
        let left = self.packet.len() - self.headers - self.done;
        if left == 0 {
            return None;
        }
        let payload = left.min(self.size);
        let last = payload == left;
        // The headers end where this packet's payload begins. What they overwrite was handed out before.
        let packet = &mut self.packet[self.done..self.done + self.headers + payload];
        let (head, body) = packet.split_at_mut(self.headers);
        head.copy_from_slice(&self.template[..self.headers]);
        let body_sum = sum(body);
        if self.is_v6 {
            head[4..6].copy_from_slice(&be(self.headers - 40 + payload));
        } else {
            let (length, id) = (be(self.headers + payload), self.first_id.wrapping_add(self.number).to_be_bytes());
            head[2..4].copy_from_slice(&length);
            head[4..6].copy_from_slice(&id);
            let sum = self.ip_sum + word(length) + word(id);
            head[10..12].copy_from_slice(&checksum(sum));
        }
        let l4 = &mut head[self.l4..];
        let l4_len = be(l4.len() + payload);
        let mut sum = self.l4_sum + word(l4_len) + body_sum;
        if self.is_tcp {
            #[expect(clippy::cast_possible_truncation, reason = "at most 64 KiB")]
            let sequence = self.first_sequence.wrapping_add(self.done as u32).to_be_bytes();
            let mut flags = self.flags;
            if !last {
                flags &= !(FIN | PSH);
            }
            if self.number > 0 {
                flags &= !CWR;
            }
            l4[4..8].copy_from_slice(&sequence);
            l4[TCP_FLAGS] = flags;
            sum += word([sequence[0], sequence[1]]) + word([sequence[2], sequence[3]]) + word([0, flags]);
            l4[TCP_CHECKSUM..TCP_CHECKSUM + 2].copy_from_slice(&checksum(sum));
        } else {
            l4[4..6].copy_from_slice(&l4_len);
            sum += word(l4_len);
            l4[UDP_CHECKSUM..UDP_CHECKSUM + 2].copy_from_slice(&udp_checksum(sum));
        }
        self.done += payload;
        self.number = self.number.wrapping_add(1);
        Some(packet)
    }
}

/// Finds packets that can be given to the kernel as one. Holds no packets: they stay in one block of memory, where their
/// places are told by ranges.
///
/// Order is kept: superpackets leave in the order of their first packets, a packet joins only the latest superpacket of
/// its flow, and one that cannot join ends it.
#[derive(Debug, Default)]
pub struct Merger {
    tcp: bool,
    udp: bool,
    groups: Vec<Group>,
    /// The packets in order of arrival, with the number of the next of the same group.
    packets: Vec<(Range<usize>, Option<usize>)>,
    /// Groups that may still grow, the latest last.
    open: Vec<usize>,
}

/// Flows that are followed at once: what one or a few receiving calls bring hardly holds more.
const OPEN: usize = 8;

/// Packets that leave as one.
#[derive(Debug, Clone, Copy)]
struct Group {
    /// Numbers of the first and the last.
    first: usize,
    last: usize,
    packets: usize,
    /// Bytes, with one set of headers.
    len: usize,
    shape: Shape,
    /// Payload of the first packet; the others are as long, the last may be shorter.
    size: usize,
    next_sequence: u32,
    next_id: u16,
    /// The last packet has PSH set.
    push: bool,
    /// Takes no more.
    full: bool,
}

/// What matters of a packet for merging.
#[derive(Debug, Clone, Copy, Default)]
struct Shape {
    kind: u8,
    l4: usize,
    headers: usize,
    payload: usize,
    mergeable: bool,
}

impl Merger {
    /// Merges what the kernel takes merged.
    #[must_use]
    pub fn new(tcp: bool, udp: bool) -> Self {
        Self { tcp, udp, ..Self::default() }
    }

    /// Takes note of a packet at `place` of `memory`.
    pub fn add(&mut self, memory: &[u8], place: Range<usize>) {
        let packet = memory.get(place.clone()).unwrap_or_default();
        let index = self.packets.len();
        self.packets.push((place, None));
        let Some(mut shape) = shape(packet) else {
            // Nothing may overtake what is not understood.
            self.open.clear();
            self.groups.push(Group::new(index, packet, Shape::default()));
            return;
        };
        shape.mergeable &= if shape.kind == UDP { self.udp } else { self.tcp };
        let first_of = |group: &Group| &memory[self.packets[group.first].0.clone()];
        let flow = self.open.iter().rposition(|number| {
            let group = &self.groups[*number];
            group.shape.kind == shape.kind && same_flow(first_of(group), packet, shape.l4)
        });
        if let Some(at) = flow {
            let number = self.open[at];
            let group = &self.groups[number];
            let joins = group.takes(first_of(group), packet, &shape);
            let group = &mut self.groups[number];
            if joins {
                self.packets[group.last].1 = Some(index);
                group.join(index, packet, &shape);
            }
            if !joins || group.full {
                self.open.remove(at);
            }
            if joins {
                return;
            }
        }
        let group = Group::new(index, packet, shape);
        if !group.full && checksum_is_right(packet, &shape) {
            if self.open.len() == OPEN {
                self.open.remove(0);
            }
            self.open.push(self.groups.len());
        }
        self.groups.push(group);
    }

    /// No packet is noted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// Hands every superpacket to `each`, in order, and forgets them: its header; `memory`; and the places of its pieces
    /// there. The first begins with the headers, which were changed for the purpose.
    pub fn drain(&mut self, memory: &mut [u8], mut each: impl FnMut(&Offload, &[u8], Pieces<'_>)) {
        for group in &self.groups {
            let offload = group.finish(&mut memory[self.packets[group.first].0.clone()]);
            each(&offload, memory, Pieces { packets: &self.packets, next: Some(group.first), skip: 0, group });
        }
        self.groups.clear();
        self.packets.clear();
        self.open.clear();
    }
}

/// The places of a superpacket's pieces, in order.
#[derive(Debug, Clone)]
pub struct Pieces<'a> {
    packets: &'a [(Range<usize>, Option<usize>)],
    next: Option<usize>,
    skip: usize,
    group: &'a Group,
}

impl Pieces<'_> {
    /// The place of the first packet, with the headers.
    #[must_use]
    pub fn first(&self) -> Range<usize> {
        self.packets[self.group.first].0.clone()
    }

    /// How many packets there were.
    #[must_use]
    pub const fn packets(&self) -> usize {
        self.group.packets
    }
}

impl Iterator for Pieces<'_> {
    type Item = Range<usize>;

    fn next(&mut self) -> Option<Range<usize>> {
        let (place, next) = self.packets.get(self.next?)?;
        let piece = place.start + self.skip..place.end;
        // All but the first leave their headers out.
        self.skip = self.group.shape.headers;
        self.next = *next;
        Some(piece)
    }
}

impl Group {
    fn new(index: usize, packet: &[u8], shape: Shape) -> Self {
        let mut group = Self {
            first: index,
            last: index,
            packets: 1,
            len: packet.len(),
            shape,
            size: shape.payload,
            next_sequence: 0,
            next_id: 0,
            push: false,
            full: !shape.mergeable,
        };
        if shape.mergeable {
            group.expect_after(packet, &shape);
        }
        group
    }

    /// Notes how the packet after this one, the last, must begin.
    fn expect_after(&mut self, packet: &[u8], shape: &Shape) {
        if shape.kind != UDP {
            #[expect(clippy::cast_possible_truncation, reason = "at most 64 KiB")]
            let payload = shape.payload as u32;
            self.next_sequence = sequence(packet, shape.l4).wrapping_add(payload);
            self.push = packet[shape.l4 + TCP_FLAGS] & PSH != 0;
        }
        self.next_id = ipv4_id(packet).wrapping_add(1);
        self.full |= self.push || self.packets == MAX_PACKETS || shape.payload < self.size;
    }

    /// The packet, of the same flow, continues this group.
    fn takes(&self, first: &[u8], packet: &[u8], shape: &Shape) -> bool {
        let not_fragmented = |packet: &[u8]| packet[6] & 0x40 != 0;
        shape.mergeable
            && shape.payload <= self.size
            && self.len + shape.payload <= MAX_SUPERPACKET
            && same_headers(first, packet, &self.shape, shape)
            && (packet[0] >> 4 == 6 || not_fragmented(packet) || ipv4_id(packet) == self.next_id)
            && (shape.kind == UDP || sequence(packet, shape.l4) == self.next_sequence)
            && checksum_is_right(packet, shape)
    }

    fn join(&mut self, index: usize, packet: &[u8], shape: &Shape) {
        self.last = index;
        self.packets += 1;
        self.len += shape.payload;
        self.expect_after(packet, shape);
    }

    /// Turns the headers of the first packet into those of the superpacket.
    fn finish(&self, first: &mut [u8]) -> Offload {
        if self.packets == 1 {
            return Offload::default();
        }
        let Shape { kind, l4, headers, .. } = self.shape;
        let addresses = if first[0] >> 4 == 6 {
            first[4..6].copy_from_slice(&be(self.len - 40));
            8..40
        } else {
            first[2..4].copy_from_slice(&be(self.len));
            first[10..12].fill(0);
            let sum = checksum(sum(&first[..l4]));
            first[10..12].copy_from_slice(&sum);
            12..20
        };
        let l4_len = be(self.len - l4);
        let (protocol, checksum_at) = if kind == UDP {
            first[l4 + 4..l4 + 6].copy_from_slice(&l4_len);
            (PROTOCOL_UDP, UDP_CHECKSUM)
        } else {
            first[l4 + TCP_FLAGS] |= if self.push { PSH } else { 0 };
            (PROTOCOL_TCP, TCP_CHECKSUM)
        };
        let pseudo = fold(sum(&first[addresses]) + word([0, protocol]) + word(l4_len)).to_ne_bytes();
        first[l4 + checksum_at..l4 + checksum_at + 2].copy_from_slice(&pseudo);
        Offload {
            flags: NEEDS_CHECKSUM,
            kind,
            header_len: small(headers),
            size: small(self.size),
            checksum_start: small(l4),
            checksum_offset: small(checksum_at),
        }
    }
}

/// None: neither TCP nor UDP, with IPv4 options or IPv6 extension headers, a fragment, or malformed.
fn shape(packet: &[u8]) -> Option<Shape> {
    let (l4, protocol, v6) = match packet.first()? {
        0x45 => {
            let header = packet.first_chunk::<20>()?;
            let whole = [header[6] & 0x3F, header[7]] == [0, 0] && header[2..4] == be(packet.len());
            whole.then_some((20, header[9], false))?
        }
        first if first >> 4 == 6 => {
            let header = packet.first_chunk::<40>()?;
            (header[4..6] == be(packet.len() - 40)).then_some((40, header[6], true))?
        }
        _ => return None,
    };
    match protocol {
        PROTOCOL_TCP => {
            let header = packet.get(l4..)?.first_chunk::<20>()?;
            let headers = l4 + usize::from(header[12] >> 4) * 4;
            let payload = packet.len().checked_sub(headers).filter(|_| headers >= l4 + 20)?;
            // Anything but more of the same has to be seen by the receiver on its own.
            let mergeable = payload > 0 && header[TCP_FLAGS] & !(PSH | ECE) == ACK;
            Some(Shape { kind: if v6 { TCP6 } else { TCP4 }, l4, headers, payload, mergeable })
        }
        PROTOCOL_UDP => {
            let header = packet.get(l4..)?.first_chunk::<8>()?;
            let headers = l4 + 8;
            let payload = packet.len() - headers;
            let summed = header[UDP_CHECKSUM..] != [0, 0];
            let mergeable = payload > 0 && summed && header[4..6] == be(packet.len() - l4);
            Some(Shape { kind: UDP, l4, headers, payload, mergeable })
        }
        _ => None,
    }
}

/// Addresses and ports are the same. Both have transport headers at `l4`, or are of different IP versions.
fn same_flow(a: &[u8], b: &[u8], l4: usize) -> bool {
    let addresses = if l4 == 40 { 8..40 } else { 12..20 };
    a[0] >> 4 == b[0] >> 4 && a[addresses.clone()] == b[addresses] && a[l4..l4 + 4] == b[l4..l4 + 4]
}

/// The headers of two packets of one flow differ at most in what a cut makes anew.
fn same_headers(a: &[u8], b: &[u8], of_a: &Shape, of_b: &Shape) -> bool {
    if of_a.headers != of_b.headers {
        return false;
    }
    let l4 = of_a.l4;
    // Version, traffic class and flow label, hop limit; or type of service, flags, time to live.
    let ip = if l4 == 40 { a[..4] == b[..4] && a[7] == b[7] } else { a[1] == b[1] && a[6] == b[6] && a[8] == b[8] };
    // Acknowledgement, header length and reserved bits, flags, window, urgent pointer, options.
    let tcp = || {
        let (a, b) = (&a[l4..of_a.headers], &b[l4..of_b.headers]);
        a[8..13] == b[8..13] && (a[13] ^ b[13]) & !PSH == 0 && a[14..16] == b[14..16] && a[18..] == b[18..]
    };
    ip && (of_a.kind == UDP || tcp())
}

/// A wrong checksum must reach the receiver, who would not see it in a superpacket.
fn checksum_is_right(packet: &[u8], shape: &Shape) -> bool {
    let v6 = packet[0] >> 4 == 6;
    let (addresses, protocol) = (if v6 { 8..40 } else { 12..20 }, if shape.kind == UDP { 17 } else { 6 });
    let l4 = &packet[shape.l4..];
    fold(sum(&packet[addresses]) + word([0, protocol]) + word(be(l4.len())) + sum(l4)) == 0xFFFF
}

fn sequence(packet: &[u8], l4: usize) -> u32 {
    u32::from_be_bytes([packet[l4 + 4], packet[l4 + 5], packet[l4 + 6], packet[l4 + 7]])
}

fn ipv4_id(packet: &[u8]) -> u16 {
    u16::from_be_bytes([packet[4], packet[5]])
}

// ---- Internet checksums, RFC 1071: sums in the machine's byte order, which come out right in memory --------------------

fn sum(bytes: &[u8]) -> u64 {
    // Two sums side by side, which the compiler turns into vectors of them. Neither can overflow: a packet is short.
    let (blocks, rest) = bytes.as_chunks::<8>();
    let (mut low, mut high) = (0u64, 0u64);
    for block in blocks {
        let block = u64::from_ne_bytes(*block);
        low += block & 0xFFFF_FFFF;
        high += block >> 32;
    }
    let (pairs, last) = rest.as_chunks::<2>();
    let rest: u64 = pairs.iter().map(|pair| word(*pair)).sum();
    low + high + rest + last.first().map_or(0, |last| word([*last, 0]))
}

fn word(bytes: [u8; 2]) -> u64 {
    u64::from(u16::from_ne_bytes(bytes))
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    small(usize::try_from(sum).unwrap_or_default())
}

fn checksum(sum: u64) -> [u8; 2] {
    (!fold(sum)).to_ne_bytes()
}

/// Zero would mean that there is none.
fn udp_checksum(sum: u64) -> [u8; 2] {
    match checksum(sum) {
        [0, 0] => [0xFF, 0xFF],
        sum => sum,
    }
}

/// A length as headers have it.
fn be(len: usize) -> [u8; 2] {
    small(len).to_be_bytes()
}

/// Every length here is that of a part of a packet.
fn small(len: usize) -> u16 {
    u16::try_from(len).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests;
