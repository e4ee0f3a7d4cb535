//! `.dockerignore`: which files of a context are no part of the build.

use super::pattern::Pattern;

const PATTERNS: usize = 10_000;

#[derive(Debug, Default)]
pub(crate) struct Ignore {
    /// In their order; true: an exception (`!`).
    rules: Vec<(Pattern, bool)>,
}

impl Ignore {
    /// Parses a file's text; an error names the line.
    pub fn parse(text: &str) -> Result<Ignore, (usize, String)> {
        let mut ignore = Ignore::default();
        for (at, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
            if !line.starts_with('#') {
                ignore.add(line.trim()).map_err(|why| (at + 1, why))?;
            }
            if ignore.rules.len() > PATTERNS {
                return Err((at + 1, format!("more than {PATTERNS} patterns")));
            }
        }
        Ok(ignore)
    }

    pub fn add(&mut self, pattern: &str) -> Result<(), String> {
        let (exception, pattern) = match pattern.strip_prefix('!') {
            Some(rest) => (true, rest.trim()),
            None => (false, pattern),
        };
        let parts: Vec<&str> = pattern.split('/').filter(|p| !p.is_empty() && *p != ".").collect();
        if parts.is_empty() {
            return Ok(());
        }
        self.rules.push((Pattern::path(&parts.join("/"))?, exception));
        Ok(())
    }

    /// Whether a path (relative, with `/`) is left out. A pattern that matches a directory matches what is in it.
    pub fn excludes(&self, path: &str) -> bool {
        let ends: Vec<usize> = path.match_indices('/').map(|(at, _)| at).chain([path.len()]).collect();
        let mut excluded = false;
        for (pattern, exception) in &self.rules {
            if excluded == *exception && ends.iter().any(|end| path.get(..*end).is_some_and(|p| pattern.matches(p))) {
                excluded = !exception;
            }
        }
        excluded
    }

    /// Whether something in an excluded directory may be let in again.
    pub fn has_exceptions(&self) -> bool {
        self.rules.iter().any(|(_, exception)| *exception)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_match_counts() {
        let ignore = Ignore::parse("# a comment\n*.log\n\n/target\n**/secret*\ndocs\n!docs/README.md\n").unwrap();
        for path in ["a.log", "target", "target/x/y", "a/secret.txt", "secret", "docs", "docs/a"] {
            assert!(ignore.excludes(path), "{path}");
        }
        for path in ["a/b.log", "src/target.rs", "docs/README.md", "src"] {
            assert!(!ignore.excludes(path), "{path}");
        }
        assert_eq!(Ignore::parse("a\n[b").unwrap_err().0, 2);
    }
}
