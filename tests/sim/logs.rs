//! Catches what the code under test logs. An ERROR fails the run: state machines that meet the unexpected say so there.
//!
//! boringtun's own targets are exempt: it calls the expiry of a session an error.

use std::cell::RefCell;
use std::fmt::Write as _;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::DefaultGuard;
use tracing::{Event, Level, Metadata, Subscriber};

thread_local! {
    static ERRORS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

struct Catch {
    aloud: bool,
}

/// Catches this thread's events until the guard is dropped. `aloud`: prints them too.
pub(crate) fn catch(aloud: bool) -> DefaultGuard {
    ERRORS.with_borrow_mut(Vec::clear);
    tracing::subscriber::set_default(Catch { aloud })
}

/// The ERROR events so far.
pub(crate) fn errors() -> Vec<String> {
    ERRORS.with_borrow(Vec::clone)
}

impl Subscriber for Catch {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let limit = if self.aloud { Level::DEBUG } else { Level::ERROR };
        *metadata.level() <= limit && !metadata.target().starts_with("boringtun")
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line(format!("{} {}:", event.metadata().level(), event.metadata().target()));
        event.record(&mut line);
        if self.aloud {
            crate::say(&line.0);
        }
        if *event.metadata().level() == Level::ERROR {
            ERRORS.with_borrow_mut(|errors| errors.push(line.0));
        }
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.0, " {value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_errors_of_others_than_boringtun_count() {
        let guard = catch(false);
        tracing::warn!("fine");
        tracing::error!(target: "boringtun::noise", "fine too");
        assert_eq!(errors(), Vec::<String>::new());
        tracing::error!(peer = 7, "not fine");
        assert_eq!(errors().len(), 1);
        assert!(errors()[0].contains("not fine") && errors()[0].contains("peer=7"), "{:?}", errors());
        drop(guard);
    }
}
