//! Watches. One store watch per resource feeds all its watchers: an event is decoded once, and serialised once for all
//! watchers that want the same form of it.

mod feed;
mod filter;

pub use feed::{Change, Event, Feeds, Watcher};
pub use filter::Filter;
