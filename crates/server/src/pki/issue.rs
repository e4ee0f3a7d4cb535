//! Reading certificates back and issuing them again when they near their end.

use super::{ADMIN_LIFE, CA_LIFE, PkiError, SERVER_LIFE, read_text, write_private};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Clocks differ; what is issued now is valid a little before now.
const SKEW: Duration = Duration::from_secs(300);

/// A certificate, and its key (empty for the authority, whose key stands alone).
#[derive(Clone)]
pub(super) struct Pair {
    pub pem: String,
    pub der: CertificateDer<'static>,
    pub key_pem: String,
}

/// The key in `dir/name`, made if it is not there.
pub(super) fn key(dir: &Path, name: &str, what: &'static str) -> Result<KeyPair, PkiError> {
    let path = dir.join(name);
    if let Some(text) = read_text(&path)? {
        return KeyPair::from_pem(&text).map_err(|e| PkiError::Damaged {
            path,
            dir: dir.to_owned(),
            what,
            why: e.to_string(),
        });
    }
    let key =
        KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(|source| PkiError::Issue { what, source })?;
    write_private(&path, key.serialize_pem().as_bytes())?;
    Ok(key)
}

/// The authority's certificates, newest first; the newest has at least a third of its life left.
pub(super) fn authority(dir: &Path, key: &KeyPair, now: SystemTime) -> Result<Vec<Pair>, PkiError> {
    let path = dir.join("ca.crt");
    let mut known = Vec::new();
    if let Some(text) = read_text(&path)? {
        let damaged =
            |why: String| PkiError::Damaged { path: path.clone(), dir: dir.to_owned(), what: "CA certificate", why };
        for der in CertificateDer::pem_slice_iter(text.as_bytes()) {
            let der = der.map_err(|e| damaged(e.to_string()))?.into_owned();
            if !issued_for(&der, key) {
                return Err(damaged("it does not belong to ca.key".into()));
            }
            known.push(Pair { pem: pem(&der), der, key_pem: String::new() });
        }
        if known.is_empty() {
            return Err(damaged("no certificate in it".into()));
        }
    }
    let before = known.len();
    known.retain(|pair| validity(&pair.der).is_some_and(|(_, end)| end > now));
    let fresh = known.first().is_some_and(|pair| fresh(&pair.der, now));
    if !fresh {
        let mut params = params("atoll-ca", CA_LIFE, now);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages =
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        let certificate = params.self_signed(key).map_err(|source| PkiError::Issue { what: "CA", source })?;
        let der = certificate.der().clone();
        known.insert(0, Pair { pem: pem(&der), der, key_pem: String::new() });
    }
    if !fresh || before != known.len() {
        let text: String = known.iter().map(|pair| pair.pem.as_str()).collect();
        write_private(&path, text.as_bytes())?;
    }
    Ok(known)
}

pub(super) fn server(
    dir: &Path,
    ca_key: &KeyPair,
    ca: &[Pair],
    names: &[String],
    now: SystemTime,
) -> Result<Pair, PkiError> {
    let wrap = |source| PkiError::Issue { what: "server", source };
    let wanted = CertificateParams::new(names.to_vec()).map_err(wrap)?.subject_alt_names;
    let build = || {
        let mut params = params("atoll-api", SERVER_LIFE, now);
        params.subject_alt_names = wanted.clone();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params
    };
    leaf(dir, "server", ca_key, ca, now, |der| has_names(der, &wanted), build)
}

pub(super) fn admin(dir: &Path, ca_key: &KeyPair, ca: &[Pair], now: SystemTime) -> Result<Pair, PkiError> {
    let build = || {
        let mut params = params("atoll-admin", ADMIN_LIFE, now);
        params.distinguished_name.push(DnType::OrganizationName, "system:masters");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params
    };
    leaf(dir, "admin", ca_key, ca, now, |_| true, build)
}

/// The certificate and key in `dir/name.{crt,key}` if they fit and are fresh, else new ones.
fn leaf(
    dir: &Path,
    name: &'static str,
    ca_key: &KeyPair,
    ca: &[Pair],
    now: SystemTime,
    fits: impl Fn(&CertificateDer) -> bool,
    build: impl Fn() -> CertificateParams,
) -> Result<Pair, PkiError> {
    let (certificate_path, key_path) = (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
    if let (Some(text), Some(key_pem)) = (read_text(&certificate_path)?, read_text(&key_path)?)
        && let (Ok(der), Ok(key)) = (CertificateDer::from_pem_slice(text.as_bytes()), KeyPair::from_pem(&key_pem))
        && fresh(&der, now)
        && issued_for(&der, &key)
        && signed_by(&der, ca)
        && fits(&der)
    {
        let der = der.into_owned();
        return Ok(Pair { pem: pem(&der), der, key_pem });
    }
    let wrap = |source| PkiError::Issue { what: name, source };
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(wrap)?;
    let Some(issuer) = ca.first() else { return Err(PkiError::Tls("no CA certificate".into())) };
    let issuer = Issuer::from_ca_cert_der(&issuer.der, ca_key).map_err(wrap)?;
    let mut params = build();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, &issuer).map_err(wrap)?;
    let der = certificate.der().clone();
    let pair = Pair { pem: pem(&der), der, key_pem: key.serialize_pem() };
    // The key first: a crash between the two leaves a pair that does not match, and that is issued again.
    write_private(&key_path, pair.key_pem.as_bytes())?;
    write_private(&certificate_path, pair.pem.as_bytes())?;
    Ok(pair)
}

pub(super) fn certified(dir: &Path, pair: &Pair) -> Result<Arc<CertifiedKey>, PkiError> {
    let damaged =
        |why: String| PkiError::Damaged { path: dir.join("server.key"), dir: dir.to_owned(), what: "server key", why };
    let key = PrivateKeyDer::from_pem_slice(pair.key_pem.as_bytes()).map_err(|e| damaged(e.to_string()))?;
    let key = rustls::crypto::ring::sign::any_ecdsa_type(&key).map_err(|e| damaged(e.to_string()))?;
    Ok(Arc::new(CertifiedKey::new(vec![pair.der.clone()], key)))
}

fn params(common_name: &str, life: Duration, now: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + since.saturating_sub(SKEW);
    params.not_after = epoch + since + life;
    params
}

fn validity(der: &CertificateDer) -> Option<(SystemTime, SystemTime)> {
    let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
    let time = |t: x509_parser::time::ASN1Time| {
        u64::try_from(t.timestamp()).ok().map(|s| SystemTime::UNIX_EPOCH + Duration::from_secs(s))
    };
    Some((time(certificate.validity().not_before)?, time(certificate.validity().not_after)?))
}

/// Valid, with at least a third of its life left.
fn fresh(der: &CertificateDer, now: SystemTime) -> bool {
    let Some((from, to)) = validity(der) else { return false };
    let life = to.duration_since(from).unwrap_or_default();
    let left = to.duration_since(now).unwrap_or_default();
    from <= now && left >= life / 3
}

fn issued_for(der: &CertificateDer, key: &KeyPair) -> bool {
    x509_parser::parse_x509_certificate(der)
        .is_ok_and(|(_, c)| c.public_key().subject_public_key.data.as_ref() == key.public_key_raw())
}

fn signed_by(der: &CertificateDer, ca: &[Pair]) -> bool {
    let Ok((_, certificate)) = x509_parser::parse_x509_certificate(der) else { return false };
    ca.first().is_some_and(|issuer| {
        x509_parser::parse_x509_certificate(&issuer.der).is_ok_and(|(_, issuer)| {
            certificate.issuer() == issuer.subject() && authority_key(&certificate) == subject_key(&issuer)
        })
    })
}

fn authority_key(certificate: &x509_parser::certificate::X509Certificate) -> Option<Vec<u8>> {
    use x509_parser::extensions::ParsedExtension;
    certificate.iter_extensions().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(id) => id.key_identifier.as_ref().map(|k| k.0.to_vec()),
        _ => None,
    })
}

fn subject_key(certificate: &x509_parser::certificate::X509Certificate) -> Option<Vec<u8>> {
    use x509_parser::extensions::ParsedExtension;
    certificate.iter_extensions().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
        _ => None,
    })
}

fn has_names(der: &CertificateDer, wanted: &[SanType]) -> bool {
    use x509_parser::extensions::GeneralName;
    let Ok((_, certificate)) = x509_parser::parse_x509_certificate(der) else { return false };
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return false };
    let has = |wanted: &SanType| {
        names.value.general_names.iter().any(|name| match (name, wanted) {
            (GeneralName::DNSName(have), SanType::DnsName(want)) => *have == want.as_str(),
            (GeneralName::IPAddress(have), SanType::IpAddress(std::net::IpAddr::V4(want))) => *have == want.octets(),
            (GeneralName::IPAddress(have), SanType::IpAddress(std::net::IpAddr::V6(want))) => *have == want.octets(),
            _ => false,
        })
    };
    wanted.iter().all(has)
}

fn pem(der: &CertificateDer) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut out = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        out.push_str(&String::from_utf8_lossy(line));
        out.push('\n');
    }
    out.push_str("-----END CERTIFICATE-----\n");
    out
}
