//! As much XML as routers' answers need: elements and the text in them, in one pass, without a tree. What an answer could be
//! used to attack with (document types, entities of its own, processing) is refused or skipped.

use std::borrow::Cow;

/// `&#x10ffff;`, in bytes.
const LONGEST_ENTITY: usize = 10;

/// Something in a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item<'a> {
    /// `<u:name …>`: the name without its prefix. Attributes are left out.
    Open(&'a str),
    /// `</name>`, or the end of `<name/>`.
    Close(&'a str),
    /// Text between tags, without surrounding space, with the five entities of XML and numbers resolved.
    Text(Cow<'a, str>),
}

/// Reads a document from its beginning. Ends at its end or at what is not XML.
#[derive(Debug, Clone)]
pub struct Items<'a> {
    rest: &'a str,
    /// The name to close next, of `<name/>`.
    empty: Option<&'a str>,
}

impl<'a> Items<'a> {
    /// The items of `document`.
    #[must_use]
    pub const fn of(document: &'a str) -> Self {
        Self { rest: document, empty: None }
    }

    /// Skips to behind the next `end`; no such end is the end of the document.
    fn skip(&mut self, end: &str) {
        self.rest = self.rest.find(end).map_or("", |at| &self.rest[at + end.len()..]);
    }
}

impl<'a> Iterator for Items<'a> {
    type Item = Item<'a>;

    fn next(&mut self) -> Option<Item<'a>> {
        if let Some(name) = self.empty.take() {
            return Some(Item::Close(name));
        }
        loop {
            let Some(tag) = self.rest.strip_prefix('<') else {
                let end = self.rest.find('<').unwrap_or(self.rest.len());
                let (text, rest) = self.rest.split_at(end);
                self.rest = rest;
                if !text.trim().is_empty() {
                    return Some(Item::Text(resolve(text.trim())));
                }
                if rest.is_empty() {
                    return None;
                }
                continue;
            };
            if let Some(data) = tag.strip_prefix("![CDATA[") {
                self.rest = data;
                let text = &data[..data.find("]]>").unwrap_or(data.len())];
                self.skip("]]>");
                return Some(Item::Text(Cow::Borrowed(text)));
            }
            if tag.starts_with("!--") {
                self.skip("-->");
                continue;
            }
            if tag.starts_with('?') {
                self.skip("?>");
                continue;
            }
            if tag.starts_with('!') {
                // A document type could define entities.
                self.rest = "";
                return None;
            }
            // A `>` in an attribute's value cuts the tag short and leaves text that nobody asks for.
            let end = tag.find('>')?;
            let inside = &tag[..end];
            self.rest = &tag[end + 1..];
            if let Some(name) = inside.strip_prefix('/') {
                return Some(Item::Close(local(name)));
            }
            let name = local(inside);
            if inside.ends_with('/') {
                self.empty = Some(name);
            }
            return Some(Item::Open(name));
        }
    }
}

/// The text of the first element of that name; `None`: there is none.
#[must_use]
pub fn text_of<'a>(document: &'a str, element: &str) -> Option<Cow<'a, str>> {
    let mut items = Items::of(document).skip_while(|item| !matches!(item, Item::Open(name) if *name == element));
    items.next()?;
    match items.next()? {
        Item::Text(text) => Some(text),
        Item::Close(name) if name == element => Some(Cow::Borrowed("")),
        _ => None,
    }
}

/// A tag's name without prefix and attributes.
fn local(tag: &str) -> &str {
    let name = tag.split(|c: char| c.is_ascii_whitespace() || c == '/').next().unwrap_or(tag);
    name.rsplit(':').next().unwrap_or(name)
}

fn resolve(text: &str) -> Cow<'_, str> {
    if !text.contains('&') {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        // No entity is longer; without this bound, many `&` would make the work grow with their square.
        let end = rest.bytes().take(LONGEST_ENTITY).position(|byte| byte == b';');
        let known = end.and_then(|end| Some((character(&rest[1..end])?, end)));
        if let Some((character, end)) = known {
            out.push(character);
            rest = &rest[end + 1..];
        } else {
            out.push('&');
            rest = &rest[1..];
        }
    }
    out.push_str(rest);
    Cow::Owned(out)
}

fn character(entity: &str) -> Option<char> {
    Some(match entity {
        "lt" => '<',
        "gt" => '>',
        "amp" => '&',
        "quot" => '"',
        "apos" => '\'',
        _ => {
            let number = entity.strip_prefix('#')?;
            let code = number.strip_prefix('x').map_or_else(|| number.parse(), |hex| u32::from_str_radix(hex, 16));
            char::from_u32(code.ok()?)?
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn elements_and_text_are_read() {
        let document = "<?xml version=\"1.0\"?>\r\n<!-- <a>no</a> --><s:root xmlns=\"x\">\n <u:a k='v'>1 &lt; &#50; &unknown; 3</u:a>\
                        <b/><c><![CDATA[<x>]]></c> </s:root>";
        let items: Vec<Item<'_>> = Items::of(document).collect();
        let text = |text: &'static str| Item::Text(Cow::Borrowed(text));
        assert_eq!(
            items,
            [
                Item::Open("root"),
                Item::Open("a"),
                text("1 < 2 &unknown; 3"),
                Item::Close("a"),
                Item::Open("b"),
                Item::Close("b"),
                Item::Open("c"),
                text("<x>"),
                Item::Close("c"),
                Item::Close("root"),
            ]
        );
        assert_eq!(text_of(document, "a").unwrap(), "1 < 2 &unknown; 3");
        assert_eq!(text_of(document, "b").unwrap(), "");
        assert_eq!(text_of(document, "root"), None, "no text of its own");
        assert_eq!(text_of(document, "d"), None);
    }

    #[test]
    fn entities_of_its_own_end_a_document() {
        let bomb = "<!DOCTYPE lolz [<!ENTITY lol \"lol\">]><a>&lol;</a>";
        assert_eq!(Items::of(bomb).next(), None);
    }

    proptest! {
        #[test]
        fn any_text_ends(text in "[<>/!?&;#a-c\\-\\[\\] \u{e4}]{0,80}") {
            let items = Items::of(&text).count();
            prop_assert!(items <= text.len() + 1);
            let _ = text_of(&text, "a");
        }
    }
}
