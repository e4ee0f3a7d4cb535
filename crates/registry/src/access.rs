//! Who may do what with which repository. The server asks for every request; what does the work is handed the [`Permit`].

use crate::answer::Refusal;
use http::StatusCode;
use image::{Error, Repository};
use std::net::SocketAddr;

/// What a request wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Talk to the registry at all (`/v2/`).
    Enter,
    /// See the names of repositories; each name shown is asked for with [`Verb::Pull`] besides.
    List,
    Pull,
    Push,
    Delete,
}

/// Who asks, as far as the connection tells.
#[derive(Clone, Debug)]
pub struct Caller {
    pub peer: SocketAddr,
    /// The `Authorization` header as it came.
    pub authorization: Option<String>,
}

/// Why not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denied {
    /// Nobody in particular asked; the value is the challenge to answer with, such as `Basic realm="atoll"`.
    Unauthenticated(String),
    Forbidden(String),
}

/// The rule of access. Called for every request, on the server's threads: it answers from memory.
pub trait Access: Send + Sync + 'static {
    /// `repository` is `None` for [`Verb::Enter`] and [`Verb::List`]. The first part of a repository's name is the
    /// Kubernetes namespace that it belongs to.
    fn decide(&self, caller: &Caller, verb: Verb, repository: Option<&str>) -> Result<(), Denied>;

    /// Whether the caller may pull everything, so that no repository needs to be asked for one by one.
    fn sees_everything(&self, caller: &Caller) -> bool;
}

/// Whoever reaches the socket is the administrator: the registry listens on the loopback address.
pub struct Administrator;

impl Access for Administrator {
    fn decide(&self, _: &Caller, _: Verb, _: Option<&str>) -> Result<(), Denied> {
        Ok(())
    }

    fn sees_everything(&self, _: &Caller) -> bool {
        true
    }
}

/// Proof that the rule of access was asked about one repository. Made here only.
#[derive(Clone, Debug)]
pub(crate) struct Permit {
    repository: Repository,
}

impl Permit {
    pub fn ask(access: &dyn Access, caller: &Caller, verb: Verb, repository: Repository) -> Result<Permit, Refusal> {
        access.decide(caller, verb, Some(&repository.path)).map_err(refuse)?;
        Ok(Permit { repository })
    }

    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// A repository that the caller may pull from, by name; `None` where it may not, as if it did not exist.
    pub fn to_pull(access: &dyn Access, caller: &Caller, name: &str) -> Result<Option<Permit>, Error> {
        let repository = Repository::local(name)?;
        Ok(Permit::ask(access, caller, Verb::Pull, repository).ok())
    }
}

/// For requests that name no repository.
pub(crate) fn enter(access: &dyn Access, caller: &Caller, verb: Verb) -> Result<(), Refusal> {
    access.decide(caller, verb, None).map_err(refuse)
}

fn refuse(denied: Denied) -> Refusal {
    match denied {
        Denied::Unauthenticated(challenge) => {
            Refusal::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", "say who you are (WWW-Authenticate says how)")
                .with("www-authenticate", challenge)
        }
        Denied::Forbidden(why) => Refusal::new(StatusCode::FORBIDDEN, "DENIED", why),
    }
}
