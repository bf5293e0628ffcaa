//! What happened, as a hash that two runs of one seed must share, and as a sequence diagram when a run fails.
//!
//! Only sizes, kinds, places and times go in, never payload bytes: WireGuard's ephemeral keys come from the operating
//! system, and nothing that follows may depend on them. A hash that differs between two runs says that something does.

use std::collections::VecDeque;
use std::fmt::Write as _;

use meshd::time::Now;

use crate::dice::mix;

/// How many of the last lines a failure shows.
const KEPT: usize = 400;

/// Who did or saw something: an index into the trace's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Who(usize);

#[derive(Debug, Clone)]
enum Line {
    Hop { from: Who, to: Who, label: &'static str, len: usize, lost: Option<&'static str> },
    Note { who: Who, text: String },
}

/// The record of one run.
#[derive(Debug)]
pub(crate) struct Trace {
    hash: u64,
    lines: u64,
    names: Vec<String>,
    recent: VecDeque<(Now, Line)>,
    /// Print every line as it happens.
    aloud: bool,
}

impl Trace {
    pub(crate) fn new(aloud: bool) -> Self {
        Self { hash: 0, lines: 0, names: Vec::new(), recent: VecDeque::new(), aloud }
    }

    /// Adds a name; lines refer to it.
    pub(crate) fn name(&mut self, name: &str) -> Who {
        self.names.push(name.to_owned());
        Who(self.names.len() - 1)
    }

    /// A datagram crossed from one place to the next, or was lost there.
    pub(crate) fn hop(&mut self, at: Now, from: Who, to: Who, bytes: &[u8], lost: Option<&'static str>) {
        self.hop_labelled(at, from, to, label(bytes), bytes.len(), lost);
    }

    /// The same, for what is no datagram.
    pub(crate) fn hop_labelled(
        &mut self,
        at: Now,
        from: Who,
        to: Who,
        label: &'static str,
        len: usize,
        lost: Option<&'static str>,
    ) {
        self.absorb(at.0);
        self.absorb(((from.0 as u64) << 32) | to.0 as u64);
        self.absorb_text(label);
        self.absorb(len as u64);
        self.absorb_text(lost.unwrap_or(""));
        self.keep(at, Line::Hop { from, to, label, len, lost });
    }

    /// Something worth showing between the datagrams.
    pub(crate) fn note(&mut self, at: Now, who: Who, text: String) {
        self.absorb(at.0);
        self.absorb(who.0 as u64);
        self.absorb_text(&text);
        self.keep(at, Line::Note { who, text });
    }

    /// Depends on every line so far, in order.
    pub(crate) const fn hash(&self) -> u64 {
        self.hash
    }

    /// The last lines as a Mermaid sequence diagram.
    pub(crate) fn mermaid(&self) -> String {
        let mut out = String::from("sequenceDiagram\n");
        for name in &self.names {
            let _ = writeln!(out, "  participant {name}");
        }
        let omitted = self.lines - self.recent.len() as u64;
        if omitted > 0 {
            let _ = writeln!(out, "  %% {omitted} earlier lines omitted");
        }
        for (at, line) in &self.recent {
            let _ = writeln!(out, "  {}", self.render(*at, line));
        }
        out
    }

    fn render(&self, at: Now, line: &Line) -> String {
        let name = |who: &Who| self.names.get(who.0).map_or("?", String::as_str);
        match line {
            Line::Hop { from, to, label, len, lost: None } => {
                format!("{}->>{}: {at:?} {label} {len} B", name(from), name(to))
            }
            Line::Hop { from, to, label, len, lost: Some(why) } => {
                format!("{}-x{}: {at:?} {label} {len} B, {why}", name(from), name(to))
            }
            Line::Note { who, text } => format!("Note over {}: {at:?} {text}", name(who)),
        }
    }

    fn keep(&mut self, at: Now, line: Line) {
        self.lines += 1;
        if self.aloud {
            crate::say(&self.render(at, &line));
        }
        if self.recent.len() == KEPT {
            self.recent.pop_front();
        }
        self.recent.push_back((at, line));
    }

    fn absorb(&mut self, word: u64) {
        self.hash = mix(self.hash.rotate_left(5) ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
    }

    fn absorb_text(&mut self, text: &str) {
        self.absorb(text.len() as u64);
        for chunk in text.as_bytes().chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.absorb(u64::from_le_bytes(word));
        }
    }
}

/// What a datagram is, by its first bytes. Deliberately not the engine's classifier.
pub(crate) fn label(bytes: &[u8]) -> &'static str {
    let cookie = bytes.get(4..8) == Some(&[0x21, 0x12, 0xa4, 0x42]);
    match bytes {
        [0 | 1, ..] if cookie => {
            // A path probe carries more than the 20 bytes of header that a plain question has.
            match (bytes[0], bytes.len()) {
                (0, 20..=40) => "stun-request",
                (0, _) => "probe",
                (_, len) if has_attribute(bytes, MESSAGE_INTEGRITY_SHA256) && len > 40 => "probe-answer",
                _ => "stun-answer",
            }
        }
        [1, 0, 0, 0, ..] => "wg-initiation",
        [2, 0, 0, 0, ..] => "wg-response",
        [3, 0, 0, 0, ..] => "wg-cookie",
        [4, 0, 0, 0, ..] if bytes.len() == 32 => "wg-keepalive",
        [4, 0, 0, 0, ..] => "wg-data",
        _ => "other",
    }
}

/// RFC 8489 section 18.3.
const MESSAGE_INTEGRITY_SHA256: u16 = 0x001c;

fn has_attribute(stun: &[u8], wanted: u16) -> bool {
    let mut rest = stun.get(20..).unwrap_or_default();
    while let [t0, t1, l0, l1, tail @ ..] = rest {
        if u16::from_be_bytes([*t0, *t1]) == wanted {
            return true;
        }
        let len = usize::from(u16::from_be_bytes([*l0, *l1])).next_multiple_of(4);
        rest = tail.get(len..).unwrap_or_default();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(lens: &[usize]) -> Trace {
        let mut trace = Trace::new(false);
        let (a, b) = (trace.name("a"), trace.name("b"));
        for (i, len) in lens.iter().enumerate() {
            trace.hop(Now::from_millis(i as u64), a, b, &vec![9; *len], None);
        }
        trace
    }

    #[test]
    fn the_hash_depends_on_every_line_and_their_order() {
        assert_eq!(run(&[1, 2, 3]).hash(), run(&[1, 2, 3]).hash());
        assert_ne!(run(&[1, 2, 3]).hash(), run(&[1, 3, 2]).hash());
        assert_ne!(run(&[1, 2]).hash(), run(&[1, 2, 0]).hash());
    }

    #[test]
    fn a_diagram_names_everybody_and_says_what_it_left_out() {
        let mut trace = run(&vec![5; KEPT + 7]);
        let a = Who(0);
        trace.note(Now::from_millis(3), a, "slept".into());
        let text = trace.mermaid();
        assert!(text.starts_with("sequenceDiagram\n  participant a\n  participant b\n"));
        assert!(text.contains("%% 8 earlier lines omitted"), "{text}");
        assert!(text.contains("Note over a: 0.003000s slept"));
        assert_eq!(text.lines().filter(|l| l.contains("->>")).count(), KEPT - 1);
    }

    #[test]
    fn datagrams_are_told_apart() {
        assert_eq!(label(&[4, 0, 0, 0]), "wg-data");
        assert_eq!(label(&[1, 0, 0, 0, 9]), "wg-initiation");
        let mut stun = vec![0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42];
        stun.resize(20, 0);
        assert_eq!(label(&stun), "stun-request");
        stun[0] = 1;
        assert_eq!(label(&stun), "stun-answer");
        stun.extend([0, 0x1c, 0, 32]);
        stun.resize(56, 0);
        assert_eq!(label(&stun), "probe-answer");
        assert_eq!(label(&[]), "other");
    }
}
