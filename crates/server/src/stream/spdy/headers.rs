//! SPDY/3 header blocks: name/value pairs in one zlib stream per direction and connection, primed with the
//! specification's dictionary (section 2.6.10).

use super::frame::SpdyError;
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};
use std::sync::LazyLock;

/// Longest block after decompression.
const MAX_BLOCK: usize = 64 << 10;
const MAX_PAIRS: usize = 64;

/// First part of the dictionary: each word with its length before it.
const WORDS: &str = "options|head|post|put|delete|trace|accept|accept-charset|accept-encoding|accept-language|\
accept-ranges|age|allow|authorization|cache-control|connection|content-base|content-encoding|content-language|\
content-length|content-location|content-md5|content-range|content-type|date|etag|expect|expires|from|host|if-match|\
if-modified-since|if-none-match|if-range|if-unmodified-since|last-modified|location|max-forwards|pragma|\
proxy-authenticate|proxy-authorization|range|referer|retry-after|server|te|trailer|transfer-encoding|upgrade|\
user-agent|vary|via|warning|www-authenticate|method|get|status|200 OK|version|HTTP/1.1|url|public|set-cookie|\
keep-alive|origin";
/// Second part, as it is.
const TAIL: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 \
Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 Not \
Found500 Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov \
Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,application/xml,\
application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=\
iso-8859-1,utf-,*,enq=0.";

static DICTIONARY: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut dictionary = Vec::with_capacity(1423);
    for word in WORDS.split('|') {
        dictionary.extend_from_slice(&(word.len() as u32).to_be_bytes());
        dictionary.extend_from_slice(word.as_bytes());
    }
    dictionary.extend_from_slice(TAIL.as_bytes());
    dictionary
});

/// The headers of one stream; names are lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// The first value of `name` (lower case), or `""`.
    pub fn get(&self, name: &str) -> &str {
        self.0.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value)
    }

    /// A decompressed block. Several values of one name are separated by NUL.
    pub fn parse(block: &[u8]) -> Result<Headers, SpdyError> {
        let mut rest = block;
        let count = take_u32(&mut rest)?;
        if count > MAX_PAIRS {
            return Err(SpdyError::Headers("more than 64 of them"));
        }
        let mut pairs = Vec::with_capacity(count);
        for _ in 0..count {
            let name = take_text(&mut rest)?.to_ascii_lowercase();
            let value = take_text(&mut rest)?;
            let value = value.split('\0').next().unwrap_or_default().to_owned();
            pairs.push((name, value));
        }
        Ok(Headers(pairs))
    }
}

fn take_u32(rest: &mut &[u8]) -> Result<usize, SpdyError> {
    let (number, tail) = rest.split_first_chunk::<4>().ok_or(SpdyError::Headers("the block ends early"))?;
    *rest = tail;
    Ok(u32::from_be_bytes(*number) as usize)
}

fn take_text<'a>(rest: &mut &'a [u8]) -> Result<&'a str, SpdyError> {
    let length = take_u32(rest)?;
    let (text, tail) = rest.split_at_checked(length).ok_or(SpdyError::Headers("the block ends early"))?;
    *rest = tail;
    std::str::from_utf8(text).map_err(|_| SpdyError::Headers("not UTF-8"))
}

/// The peer's compression state.
pub struct Inflater(Decompress);

impl Default for Inflater {
    fn default() -> Self {
        Inflater(Decompress::new(true))
    }
}

impl Inflater {
    /// One block. After an error the connection is of no use any more: the states have parted.
    pub fn headers(&mut self, compressed: &[u8]) -> Result<Headers, SpdyError> {
        let broken = SpdyError::Headers("compression is broken");
        let mut block = Vec::with_capacity(4 << 10);
        let mut rest = compressed;
        loop {
            if block.len() == block.capacity() {
                if block.len() >= MAX_BLOCK {
                    return Err(SpdyError::Headers("more than 64 KiB of them"));
                }
                block.reserve(4 << 10);
            }
            let (read, written) = (self.0.total_in(), block.len());
            let outcome = self.0.decompress_vec(rest, &mut block, FlushDecompress::Sync);
            let used = usize::try_from(self.0.total_in() - read).unwrap_or(usize::MAX);
            rest = rest.get(used..).ok_or_else(|| broken.clone())?;
            match outcome {
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0.set_dictionary(&DICTIONARY).map_err(|_| broken.clone())?;
                    continue;
                }
                Err(_) => return Err(broken),
            }
            let full = block.len() == block.capacity();
            if rest.is_empty() && !full {
                return Headers::parse(&block);
            }
            if used == 0 && block.len() == written && !full {
                return Err(broken);
            }
        }
    }
}

/// Our compression state.
pub struct Deflater(Compress);

impl Default for Deflater {
    fn default() -> Self {
        let mut compress = Compress::new(Compression::fast(), true);
        // Fails only once data has gone in.
        let _ = compress.set_dictionary(&DICTIONARY);
        Deflater(compress)
    }
}

impl Deflater {
    pub fn headers(&mut self, pairs: &[(&str, &str)]) -> Result<Vec<u8>, SpdyError> {
        let mut block = (pairs.len() as u32).to_be_bytes().to_vec();
        for (name, value) in pairs {
            for text in [name, value] {
                block.extend_from_slice(&(text.len() as u32).to_be_bytes());
                block.extend_from_slice(text.as_bytes());
            }
        }
        let mut compressed = Vec::with_capacity(block.len() + 64);
        let mut rest = block.as_slice();
        loop {
            let read = self.0.total_in();
            self.0
                .compress_vec(rest, &mut compressed, FlushCompress::Sync)
                .map_err(|_| SpdyError::Headers("cannot be compressed"))?;
            let used = usize::try_from(self.0.total_in() - read).unwrap_or(usize::MAX);
            rest = rest.get(used..).unwrap_or_default();
            if rest.is_empty() && compressed.len() < compressed.capacity() {
                return Ok(compressed);
            }
            compressed.reserve(256);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn dictionary_is_the_specifications() {
        assert_eq!(DICTIONARY.len(), 1423);
        // A zlib stream begins with the Adler-32 of its dictionary: 0xe3c6a7c2 in SPDY/3.
        let block = Deflater::default().headers(&[]).expect("compresses");
        assert_eq!(block.get(2..6), Some([0xe3, 0xc6, 0xa7, 0xc2].as_slice()));
    }

    #[test]
    fn blocks_share_one_state() {
        let (mut deflater, mut inflater) = (Deflater::default(), Inflater::default());
        for n in 0..50 {
            let port = n.to_string();
            let block = deflater.headers(&[("streamtype", "data"), ("port", &port)]).expect("compresses");
            let headers = inflater.headers(&block).expect("inflates");
            assert_eq!((headers.get("streamtype"), headers.get("port"), headers.get("x")), ("data", port.as_str(), ""));
        }
    }

    #[test]
    fn bombs_are_refused() {
        let long = "a".repeat(1 << 20);
        let block = Deflater::default().headers(&[("x", &long)]).expect("compresses");
        assert!(block.len() < 16 << 10);
        assert_eq!(Inflater::default().headers(&block), Err(SpdyError::Headers("more than 64 KiB of them")));
        let mut many = u32::MAX.to_be_bytes().to_vec();
        many.extend_from_slice(&[0; 64]);
        assert!(Headers::parse(&many).is_err());
        assert!(Inflater::default().headers(&[]).is_err());
    }

    proptest! {
        #[test]
        fn any_pairs_pass(pairs in prop::collection::vec(("[a-z]{1,9}", "[^\0]{0,40}"), 0..20)) {
            let borrowed: Vec<(&str, &str)> = pairs.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
            let block = Deflater::default().headers(&borrowed).expect("compresses");
            prop_assert_eq!(Inflater::default().headers(&block).expect("inflates"), Headers(pairs));
        }

        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300), cut in 0..100usize) {
            let _ = Headers::parse(&bytes);
            let _ = Inflater::default().headers(&bytes);
            let mut block = Deflater::default().headers(&[("streamtype", "stdout")]).expect("compresses");
            if let Some(byte) = block.get_mut(cut) {
                *byte ^= bytes.first().copied().unwrap_or(1);
            }
            let mut inflater = Inflater::default();
            let _ = inflater.headers(&block);
            let _ = inflater.headers(&bytes);
        }
    }
}
