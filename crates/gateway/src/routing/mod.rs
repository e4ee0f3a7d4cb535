//! From Gateways and HTTPRoutes to the rule of a request.
//!
//! `wire` is how the objects are written, `convert` what GRPCRoutes and Ingresses mean as HTTPRoutes. `build` puts the
//! [`Table`] together: `attach` finds the listeners of a route, `rules` reads its rules, `references` resolves what they
//! name. `host` and `matching` are the comparisons, `filter`, `cors` and `session` what a rule changes on the way.

pub(crate) mod attach;
mod build;
mod convert;
mod cors;
mod filter;
mod host;
mod matching;
pub(crate) mod references;
pub(crate) mod rules;
mod session;
mod table;
pub(crate) mod wire;

pub use build::{Objects, build};
pub(crate) use build::{ingresses, spec};
pub use cors::{Cors, is_preflight};
pub use filter::{Came, Filters, HeaderChanges, Mirror, PathChange, Redirect, Rewrite, split_port};
pub use host::{HostPattern, intersect};
pub use matching::{Match, PathMatch, Seen, TextMatch};
pub use session::{Session, Ticket};
pub use table::{Backend, Entry, Hosts, Retry, Rule, Table, Target, pick};
