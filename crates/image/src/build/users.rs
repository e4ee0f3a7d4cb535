//! Names of users and groups, as an image's own files have them.

use super::view::View;

const LIMIT: u64 = 1 << 20;

/// Who runs, or whom files belong to.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Ids {
    pub uid: u32,
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
}

/// `user[:group]`, names or numbers. A user's own group is the one in `passwd`, for files (`chown`) the one of the same
/// number.
pub(crate) fn find(view: &View, text: &str, chown: bool) -> Result<Ids, String> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|g| !g.is_empty())),
        None => (text, None),
    };
    let passwd = view.text("etc/passwd", LIMIT).unwrap_or_default();
    let groups = view.text("etc/group", LIMIT).unwrap_or_default();
    let line = |wanted: &str| {
        passwd.lines().map(|l| l.split(':').collect::<Vec<_>>()).find(|f| {
            if wanted.parse::<u32>().is_ok() { f.get(2) == Some(&wanted) } else { f.first() == Some(&wanted) }
        })
    };
    let mut ids = Ids::default();
    let mut name = None;
    if !user.is_empty() {
        let found = line(user);
        name = found.as_ref().and_then(|f| f.first().map(|n| (*n).to_owned()));
        let field = |at: usize| found.as_ref().and_then(|f| f.get(at)?.parse::<u32>().ok());
        ids.uid = match user.parse() {
            Ok(uid) => uid,
            Err(_) => field(2).ok_or_else(|| format!("user {user:?} is not in the image's /etc/passwd"))?,
        };
        ids.gid = field(3).unwrap_or(if chown { ids.uid } else { 0 });
    }
    if let Some(group) = group {
        ids.gid = match group.parse() {
            Ok(gid) => gid,
            Err(_) => groups
                .lines()
                .map(|l| l.split(':').collect::<Vec<_>>())
                .find(|f| f.first() == Some(&group))
                .and_then(|f| f.get(2)?.parse().ok())
                .ok_or_else(|| format!("group {group:?} is not in the image's /etc/group"))?,
        };
    } else if let Some(name) = name {
        let member = |fields: &[&str]| fields.get(3).is_some_and(|m| m.split(',').any(|n| n == name));
        let lines = groups.lines().map(|l| l.split(':').collect::<Vec<_>>());
        ids.groups = lines.filter(|f| member(f)).filter_map(|f| f.get(2)?.parse().ok()).take(64).collect();
    }
    Ok(ids)
}
