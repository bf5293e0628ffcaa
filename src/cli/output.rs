//! The only place that prints. Human text and JSON are made from the same value.
//!
//! Data goes to standard output, everything else to standard error. Colour appears on a terminal only and never carries
//! meaning; `NO_COLOR` turns it off. When the reader goes away (`meshd status | head -1`) the command ends quietly.

use std::io::{self, Write};

use anstyle::{AnsiColor, Style};
use serde::Serialize;

use crate::cli::error::{CliError, Kind};
use crate::wire::local::{Problem, Severity};
use crate::wire::version;

/// Where a command's output goes, and in which form.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    json: bool,
}

/// The document printed on standard output by a failed command with `--json`.
#[derive(Serialize)]
struct ErrorDocument<'a> {
    schema: u16,
    error: &'a Problem,
}

impl Output {
    /// Output as JSON documents, one a line, or as text for people.
    #[must_use]
    pub const fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether `--json` was given.
    #[must_use]
    pub const fn is_json(self) -> bool {
        self.json
    }

    /// Prints a value: as one line of JSON, or as the text `human` makes of it.
    ///
    /// # Errors
    /// [`Kind::BrokenPipe`] when the reader is gone, otherwise what the system said.
    pub fn show<T: Serialize>(self, value: &T, human: impl FnOnce(&T) -> String) -> Result<(), CliError> {
        let mut text = if self.json {
            serde_json::to_string(value).map_err(|e| CliError::failed("output", e.to_string(), ""))?
        } else {
            human(value)
        };
        if !text.ends_with('\n') && !text.is_empty() {
            text.push('\n');
        }
        self.raw(text.as_bytes())
    }

    /// Prints bytes as they are, for what has one form only (shell completions, help).
    ///
    /// # Errors
    /// As [`Output::show`].
    pub fn raw(self, bytes: &[u8]) -> Result<(), CliError> {
        let mut out = anstream::stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush()).map_err(write_failed)
    }

    /// Tells a person something that is not data. Goes to standard error; a lost reader is no failure.
    pub fn note(self, text: &str) {
        let _ = writeln!(anstream::stderr().lock(), "{text}");
    }

    /// Prints a failure; see [`crate::cli::error`].
    pub fn error(self, error: &CliError) {
        if matches!(error.kind, Kind::BrokenPipe | Kind::Told(_)) {
            return;
        }
        if self.json {
            let document = ErrorDocument { schema: version::LOCAL, error: &error.problem };
            if let Ok(line) = serde_json::to_string(&document) {
                let _ = self.raw(format!("{line}\n").as_bytes());
            }
        }
        self.note(&format!("{} {}", paint("error:", RED), error.problem.text));
        if !error.problem.hint.is_empty() {
            self.note(&format!("{} {}", paint("hint:", BOLD), error.problem.hint));
        }
    }
}

fn write_failed(error: io::Error) -> CliError {
    if error.kind() == io::ErrorKind::BrokenPipe {
        CliError::new(Kind::BrokenPipe, "broken-pipe", "the reader of the output went away", "")
    } else {
        CliError::failed("output", format!("cannot write the output: {error}"), "")
    }
}

/// Headings and labels.
pub const BOLD: Style = Style::new().bold();
/// All is well.
pub const GREEN: Style = AnsiColor::Green.on_default();
/// Works, but worse than it could.
pub const YELLOW: Style = AnsiColor::Yellow.on_default();
/// Broken.
pub const RED: Style = AnsiColor::Red.on_default().bold();

/// The text in a style; the codes are removed again where the output is no terminal.
#[must_use]
pub fn paint(text: &str, style: Style) -> String {
    format!("{style}{text}{style:#}")
}

/// The colour that goes with a severity.
#[must_use]
pub const fn severity_style(severity: Severity) -> Style {
    match severity {
        Severity::Info => BOLD,
        Severity::Warning => YELLOW,
        Severity::Error => RED,
    }
}

/// Columns padded to the widest cell, two spaces apart, the first row being the heading.
#[must_use]
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|row| row.get(c)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        let line = line.trim_end();
        text.push_str(&if number == 0 { paint(line, BOLD) } else { line.to_owned() });
        text.push('\n');
    }
    text
}

/// Bytes for people: `312 B`, `4.1 KiB`, `1.2 GiB`.
#[must_use]
pub fn bytes(n: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
    let mut value = n as f64;
    if n < 1024 {
        return format!("{n} B");
    }
    for unit in ["KiB", "MiB", "GiB", "TiB"] {
        value /= 1024.0;
        if value < 1024.0 {
            return format!("{value:.1} {unit}");
        }
    }
    format!("{:.1} PiB", value / 1024.0)
}

/// Milliseconds for people: whole from ten up, one decimal below.
#[must_use]
pub fn millis(ms: f64) -> String {
    if ms < 10.0 { format!("{ms:.1} ms") } else { format!("{ms:.0} ms") }
}

/// Seconds for people, in the largest two units: `12s`, `3m 20s`, `5h 2m`, `8d 1h`.
#[must_use]
pub fn seconds(s: u64) -> String {
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m {}s", s / 60, s % 60),
        3600..86_400 => format!("{}h {}m", s / 3600, s % 3600 / 60),
        _ => format!("{}d {}h", s / 86_400, s % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_read_naturally() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(4 * 1024 + 100), "4.1 KiB");
        assert_eq!(bytes(u64::MAX), "16384.0 PiB");
        assert_eq!(millis(0.42), "0.4 ms");
        assert_eq!(millis(31.4), "31 ms");
        assert_eq!(seconds(59), "59s");
        assert_eq!(seconds(200), "3m 20s");
        assert_eq!(seconds(8 * 86_400 + 3600), "8d 1h");
    }

    #[test]
    fn a_table_pads_every_column_but_the_last() {
        let rows = [vec!["NAME".to_owned(), "PATH".to_owned()], vec!["laptop".to_owned(), "direct".to_owned()]];
        let text = anstream::adapter::strip_str(&table(&rows)).to_string();
        assert_eq!(text, "NAME    PATH\nlaptop  direct\n");
    }
}
