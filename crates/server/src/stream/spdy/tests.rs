use super::headers::{Deflater, Inflater};
use super::reader::MAX_STREAMS;
use super::*;
use frame::{Control, HEAD, Head, put_data, syn_stream};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, DuplexStream};

/// A client made of the frame code, which its own tests check.
struct Client {
    io: DuplexStream,
    deflater: Deflater,
    inflater: Inflater,
}

#[derive(Debug, PartialEq)]
enum Seen {
    Reply(u32),
    Data(u32, bool, Vec<u8>),
    Reset(u32, u32),
    Ping(u32),
    GoAway,
    Credit(u32, u32),
}

impl Client {
    fn new(io: DuplexStream) -> Self {
        Client { io, deflater: Deflater::default(), inflater: Inflater::default() }
    }

    async fn open(&mut self, id: u32, kind: &str) {
        let block = self.deflater.headers(&[("streamtype", kind)]).expect("compresses");
        self.io.write_all(&syn_stream(id, false, &block)).await.expect("written");
    }

    async fn data(&mut self, id: u32, fin: bool, data: &[u8]) {
        let mut frame = BytesMut::new();
        put_data(&mut frame, id, fin, data);
        self.io.write_all(&frame).await.expect("written");
    }

    async fn next(&mut self) -> Option<Seen> {
        let mut head = [0; HEAD];
        self.io.read_exact(&mut head).await.ok()?;
        match Head::parse(head).expect("a head") {
            Head::Data { stream, fin, length } => {
                let mut data = vec![0; length];
                self.io.read_exact(&mut data).await.expect("data");
                Some(Seen::Data(stream, fin, data))
            }
            Head::Control { kind, flags, length } => {
                let mut body = vec![0; length];
                self.io.read_exact(&mut body).await.expect("body");
                Some(match Control::parse(kind, flags, &body).expect("a frame") {
                    Control::SynReply { stream, headers, .. } => {
                        self.inflater.headers(headers).expect("headers");
                        Seen::Reply(stream)
                    }
                    Control::Reset { stream, status } => Seen::Reset(stream, status),
                    Control::Ping(id) => Seen::Ping(id),
                    Control::GoAway { .. } => Seen::GoAway,
                    Control::WindowUpdate { stream, delta } => Seen::Credit(stream, delta),
                    other => panic!("unexpected {other:?}"),
                })
            }
        }
    }
}

fn pair() -> (Client, Connection) {
    let (near, far) = tokio::io::duplex(64 << 10);
    (Client::new(near), Connection::start(far))
}

#[tokio::test]
async fn streams_carry_bytes_both_ways() {
    let (mut client, mut server) = pair();
    client.open(1, "stdin").await;
    client.data(1, true, b"hello").await;
    let mut stream = server.accept().await.expect("opened");
    assert_eq!(stream.headers.get("streamtype"), "stdin");
    assert_eq!(stream.receive.recv().await.as_deref(), Some(b"hello".as_slice()));
    assert_eq!(stream.receive.recv().await, None);
    stream.send.send(Bytes::from_static(b"world")).await.expect("sent");
    stream.send.finish().await.expect("finished");
    tokio::spawn(server.finish());
    assert_eq!(client.next().await, Some(Seen::Reply(1)));
    assert_eq!(client.next().await, Some(Seen::Data(1, false, b"world".to_vec())));
    assert_eq!(client.next().await, Some(Seen::Data(1, true, vec![])));
    assert_eq!(client.next().await, Some(Seen::GoAway));
    assert_eq!(client.next().await, None);
}

#[tokio::test]
async fn pings_are_answered_and_dropped_streams_reset() {
    let (mut client, mut server) = pair();
    client.io.write_all(&frame::ping(1)).await.expect("written");
    assert_eq!(client.next().await, Some(Seen::Ping(1)));
    client.open(1, "data").await;
    drop(server.accept().await.expect("opened"));
    assert_eq!(client.next().await, Some(Seen::Reply(1)));
    assert_eq!(client.next().await, Some(Seen::Reset(1, ResetReason::Cancel as u32)));
}

#[tokio::test]
async fn peers_without_windows_are_not_held_to_them() {
    let (mut client, mut server) = pair();
    client.open(1, "data").await;
    let stream = server.accept().await.expect("opened");
    let sender = tokio::spawn(async move {
        let mut send = stream.send;
        for _ in 0..64 {
            send.send(vec![7u8; 64 << 10].into()).await.expect("sent");
        }
        send.finish().await.expect("finished");
    });
    let mut total = 0;
    loop {
        match client.next().await.expect("more") {
            Seen::Data(1, fin, data) => {
                total += data.len();
                if fin {
                    break;
                }
            }
            Seen::Reply(1) => {}
            other => panic!("unexpected {other:?}"),
        }
    }
    sender.await.expect("no panic");
    assert_eq!(total, 4 << 20);
}

#[tokio::test]
async fn peers_with_windows_are_kept_to_them() {
    let (mut client, mut server) = pair();
    client.io.write_all(&frame::settings_frame(&[(frame::INITIAL_WINDOW_SIZE, 1000)])).await.expect("written");
    client.open(1, "data").await;
    let mut stream = server.accept().await.expect("opened");
    let sender = tokio::spawn(async move {
        let result = stream.send.send(vec![7u8; 2500].into()).await;
        (stream, result.is_ok())
    });
    assert_eq!(client.next().await, Some(Seen::Reply(1)));
    assert_eq!(client.next().await, Some(Seen::Data(1, false, vec![7; 1000])));
    client.io.write_all(&frame::window_update(1, 1500)).await.expect("written");
    assert_eq!(client.next().await, Some(Seen::Data(1, false, vec![7; 1500])));
    let (_stream, sent) = sender.await.expect("no panic");
    assert!(sent);
}

#[tokio::test]
async fn credit_comes_back_when_bytes_are_consumed() {
    let (mut client, mut server) = pair();
    client.open(1, "data").await;
    let mut stream = server.accept().await.expect("opened");
    client.data(1, false, &vec![1; 32 << 10]).await;
    let mut got = 0;
    while got < 32 << 10 {
        got += stream.receive.recv().await.expect("bytes").len();
    }
    assert_eq!(client.next().await, Some(Seen::Reply(1)));
    assert_eq!(client.next().await, Some(Seen::Credit(1, 32 << 10)));
    assert_eq!(client.next().await, Some(Seen::Credit(0, 32 << 10)));
}

#[tokio::test]
async fn a_full_stream_holds_the_connection_but_not_the_others_sending() {
    let (mut client, mut server) = pair();
    client.open(1, "data").await;
    client.open(3, "data").await;
    let mut first = server.accept().await.expect("opened");
    let mut second = server.accept().await.expect("opened");
    let flood = tokio::spawn(async move {
        for _ in 0..100 {
            client.data(1, false, &vec![1; 32 << 10]).await;
        }
        client.data(3, true, b"after").await;
        client
    });
    // The writer gets through although the reader is blocked.
    second.send.send(Bytes::from_static(b"x")).await.expect("sent");
    let mut got = 0;
    while got < 100 * (32 << 10) {
        got += first.receive.recv().await.expect("bytes").len();
    }
    assert_eq!(second.receive.recv().await.as_deref(), Some(b"after".as_slice()));
    flood.await.expect("no panic");
}

#[tokio::test]
async fn breaking_the_protocol_ends_the_connection() {
    for bad in [
        syn_stream(2, false, &[]).to_vec(),
        vec![0x80, 2, 0, 1, 0, 0, 0, 0],
        vec![0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff],
        syn_stream(1, false, b"not zlib").to_vec(),
    ] {
        let (mut client, mut server) = pair();
        client.io.write_all(&bad).await.expect("written");
        assert!(server.accept().await.is_none());
        server.closed().cancelled().await;
    }
}

#[tokio::test]
async fn too_many_streams_are_refused() {
    let (mut client, mut server) = pair();
    let holder = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Some(stream) = server.accept().await {
            held.push(stream);
        }
        held.len()
    });
    let mut refused = false;
    for n in 0..=MAX_STREAMS as u32 {
        client.open(2 * n + 1, "data").await;
        match client.next().await.expect("an answer") {
            Seen::Reply(_) => {}
            Seen::Reset(id, reason) => {
                assert_eq!((id, reason), (2 * n + 1, ResetReason::RefusedStream as u32));
                refused = true;
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    assert!(refused);
    drop(client);
    assert_eq!(holder.await.expect("no panic"), MAX_STREAMS);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn arbitrary_bytes_never_panic(garbage in prop::collection::vec(any::<u8>(), 0..400), good in any::<bool>()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            let (mut client, mut server) = pair();
            if good {
                client.open(1, "stdin").await;
            }
            let _ = client.io.write_all(&garbage).await;
            let _ = client.io.shutdown().await;
            while let Some(mut stream) = server.accept().await {
                while stream.receive.recv().await.is_some() {}
            }
        });
    }
}
