//! Kinds of event that are counted by name and shown to people.

macro_rules! named {
    ($(#[doc = $about:literal])+ $kind:ident: $($(#[doc = $doc:literal])+ $variant:ident = $name:literal),+ $(,)?) => {
        $(#[doc = $about])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $kind {
            $($(#[doc = $doc])+ $variant),+
        }

        impl $kind {
            /// All of them, in the order of their counters.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The stable name that people and programs are shown.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }

            /// One sentence for people.
            #[must_use]
            pub fn text(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+).trim_ascii()),+ }
            }
        }
    };
}
