//! From Gateways and HTTPRoutes to the rule of a request.
//!
//! `wire` is how the objects are written, `build` checks and resolves them into a [`Table`], `host` and `matching` are
//! the comparisons, `filter` what a rule changes on the way.

mod build;
mod filter;
mod host;
mod matching;
mod table;
mod wire;

pub use build::{Objects, build};
pub use filter::{Filters, HeaderChanges, PathChange, Redirect, Rewrite, split_port};
pub use host::{HostPattern, intersect};
pub use matching::{Match, PathMatch, Seen, TextMatch};
pub use table::{Backend, Entry, Rule, Table, Target};
