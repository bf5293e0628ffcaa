use std::io::{self, IoSlice};
use std::net::UdpSocket;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use socket2::{Domain, Protocol, Type};

use super::send::{REFUSALS, REFUSED_FOR};
use super::*;
use crate::time::Now;

fn open(v6: bool) -> Option<(UdpSocket, bool)> {
    let ip: IpAddr = if v6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
    let local = SocketAddr::new(ip, 0);
    let socket = Socket::new(Domain::for_address(local), Type::DGRAM.nonblocking(), Some(Protocol::UDP)).ok()?;
    socket.bind(&local.into()).ok()?;
    let gro = enable(&socket, true, v6);
    Some((socket.into(), gro))
}

fn wait(socket: &UdpSocket) {
    assert_eq!(poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], PollTimeout::from(5_000u16)), Ok(1));
}

fn send(
    socket: BorrowedFd<'_>,
    to: &SocketAddr,
    ecn: u8,
    pieces: &[IoSlice<'_>],
    size: Option<u16>,
) -> nix::Result<()> {
    Way { socket, to: *to, from: None, ecn }.send(pieces, size)
}

/// Everything that arrives until `bytes` bytes did.
fn receive(socket: &UdpSocket, mut bytes: usize) -> (Vec<(SocketAddr, u8, Vec<u8>)>, usize) {
    let mut receiver = Trains::default();
    let (mut got, mut trains) = (Vec::new(), 0);
    while bytes > 0 {
        wait(socket);
        receiver.receive(socket.as_fd());
        for train in receiver.trains() {
            trains += 1;
            assert!(train.waited.is_some_and(|waited| waited < Duration::from_secs(5)), "{:?}", train.waited);
            for datagram in train.datagrams() {
                bytes -= datagram.len();
                got.push((train.from, train.ecn, datagram.to_vec()));
            }
        }
    }
    (got, trains)
}

#[test]
fn a_train_arrives_as_the_datagrams_it_was_made_of() {
    for v6 in [false, true] {
        let (Some((a, _)), Some((b, gro))) = (open(v6), open(v6)) else {
            eprintln!("SKIPPED: no address of this family here");
            continue;
        };
        let to = b.local_addr().unwrap();
        let bytes: Vec<u8> = (0..64 * 1000).map(|n| (n / 7) as u8).collect();
        for (len, size, ecn) in [(64_000, 1000, 0), (5500, 1000, 1), (1000, 1000, 2), (2, 1, 3)] {
            let (one, two) = bytes[..len].split_at(len / size / 2 * size);
            let pieces = [IoSlice::new(one), IoSlice::new(two)];
            match send(a.as_fd(), &to, ecn, &pieces, Some(size as u16)) {
                Ok(()) => {}
                Err(e) => {
                    eprintln!("SKIPPED: this kernel cuts no trains ({e})");
                    return;
                }
            }
            let (got, trains) = receive(&b, len);
            let from = a.local_addr().unwrap();
            let expected: Vec<_> = bytes[..len].chunks(size).map(|d| (from, ecn, d.to_vec())).collect();
            assert_eq!(got, expected);
            assert!(!gro || trains < got.len() || got.len() <= 2, "{trains} trains of {} datagrams", got.len());
        }
    }
}

#[test]
fn single_datagrams_of_every_size_arrive_up_to_the_largest() {
    let ((a, _), (b, _)) = (open(false).unwrap(), open(false).unwrap());
    let bytes = vec![7; MAX_BYTES + 1];
    for len in [1, 20, 1500, MAX_BYTES] {
        send(a.as_fd(), &b.local_addr().unwrap(), 0, &[IoSlice::new(&bytes[..len])], None).unwrap();
        let (got, _) = receive(&b, len);
        assert_eq!(got.iter().map(|(_, _, bytes)| bytes.len()).collect::<Vec<_>>(), [len]);
    }
    let too_long = send(a.as_fd(), &b.local_addr().unwrap(), 0, &[IoSlice::new(&bytes)], None);
    assert_eq!(too_long, Err(Errno::EMSGSIZE));
    // More than a train holds.
    let pieces = [IoSlice::new(&bytes[..MAX_BYTES])];
    assert!(send(a.as_fd(), &b.local_addr().unwrap(), 0, &pieces, Some(100)).is_err());
}

#[test]
fn one_datagram_has_a_time_to_live_of_its_own() {
    for v6 in [false, true] {
        let (Some((a, _)), Some((b, _))) = (open(v6), open(v6)) else {
            eprintln!("SKIPPED: no address of this family here");
            continue;
        };
        let to = b.local_addr().unwrap();
        if v6 {
            setsockopt(&b, sockopt::Ipv6RecvHopLimit, &true).unwrap();
        } else {
            setsockopt(&b, sockopt::Ipv4RecvTtl, &true).unwrap();
        }
        let hops = |socket: &UdpSocket| {
            use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
            wait(socket);
            let (mut bytes, mut control) = ([0; 16], nix::cmsg_space!([libc::c_int; 16]));
            let mut into = [io::IoSliceMut::new(&mut bytes)];
            let got = recvmsg::<()>(socket.as_raw_fd(), &mut into, Some(&mut control), MsgFlags::empty()).unwrap();
            let told = got.cmsgs().unwrap().find_map(|message| match message {
                ControlMessageOwned::Ipv4Ttl(hops) | ControlMessageOwned::Ipv6HopLimit(hops) => Some(hops),
                _ => None,
            });
            told.unwrap()
        };
        send_dying(a.as_fd(), &to, b"dies", 3).unwrap();
        assert_eq!(hops(&b), 3);
        send(a.as_fd(), &to, 0, &[IoSlice::new(b"lives")], None).unwrap();
        assert!(hops(&b) > 3);
        if !v6 {
            let refused = Err(SendError::Refused(Errno::EINVAL as i32));
            assert_eq!(send_dying(a.as_fd(), &to, b"dead", 0), refused);
        }
    }
}

#[test]
fn several_senders_and_sizes_are_told_apart() {
    let (b, _) = open(false).unwrap();
    let to = b.local_addr().unwrap();
    let senders: Vec<_> = (0..10).map(|_| open(false).unwrap().0).collect();
    let mut total = 0;
    for (n, sender) in senders.iter().enumerate() {
        let bytes = vec![n as u8; 100 + n];
        total += bytes.len();
        send(sender.as_fd(), &to, (n % 4) as u8, &[IoSlice::new(&bytes)], None).unwrap();
    }
    let (got, _) = receive(&b, total);
    for (n, ((from, ecn, bytes), sender)) in got.iter().zip(&senders).enumerate() {
        assert_eq!((*from, *ecn), (sender.local_addr().unwrap(), (n % 4) as u8));
        assert_eq!(*bytes, vec![n as u8; 100 + n]);
    }
    assert_eq!(got.len(), senders.len());
    let (rcv, snd) = buffers(&b).unwrap();
    assert!(rcv > 0 && snd > 0);
}

#[test]
fn what_a_full_buffer_lost_is_known() {
    let ((a, _), (b, _)) = (open(false).unwrap(), open(false).unwrap());
    setsockopt(&b, sockopt::RcvBuf, &1).unwrap();
    assert_eq!(overflowed(&b), 0);
    let mut way = Way { socket: a.as_fd(), to: b.local_addr().unwrap(), from: None, ecn: 0 };
    for _ in 0..100 {
        alone(&mut way, &TEN).unwrap();
    }
    let mut trains = Trains::default();
    let mut came = 0;
    loop {
        trains.receive(b.as_fd());
        match trains.trains().map(|train| train.count()).sum::<usize>() {
            0 => break,
            more => came += more,
        }
    }
    assert!((1..100).contains(&came), "{came}");
    assert_eq!(overflowed(&b), 100 - came as u64);
}

#[test]
fn every_error_of_a_send_has_its_meaning() {
    for errno in [Errno::EAGAIN, Errno::ENOBUFS, Errno::ENOMEM] {
        assert_eq!(SendError::of(errno), SendError::Full);
    }
    assert_eq!(SendError::of(Errno::EMSGSIZE), SendError::TooBig);
    for errno in [Errno::ENETUNREACH, Errno::EHOSTUNREACH, Errno::ENETDOWN, Errno::EADDRNOTAVAIL, Errno::ENODEV] {
        assert_eq!(SendError::of(errno), SendError::Unreachable);
    }
    for errno in [Errno::EPERM, Errno::EINVAL, Errno::ECONNREFUSED] {
        assert_eq!(SendError::of(errno), SendError::Refused(errno as i32));
    }
}

/// A kernel that answers as it is told to, and notes what it took.
#[derive(Default)]
struct Fake {
    /// The answer to a train, always.
    trains: Option<Errno>,
    /// The answers to what comes, one after the other; then everything is taken.
    answers: Vec<Errno>,
    /// Datagrams over this length are refused.
    longest: Option<usize>,
    calls: usize,
    waits: usize,
    /// Datagrams of each send that was taken.
    taken: Vec<usize>,
}

impl Exit for Fake {
    fn send(&mut self, pieces: &[IoSlice<'_>], size: Option<u16>) -> nix::Result<()> {
        self.calls += 1;
        if !self.answers.is_empty() {
            return Err(self.answers.remove(0));
        }
        let len: usize = pieces.iter().map(|piece| piece.len()).sum();
        let each = size.map_or(len, usize::from);
        match self.trains {
            Some(errno) if size.is_some() => return Err(errno),
            _ => {}
        }
        if self.longest.is_some_and(|longest| each > longest) {
            return Err(Errno::EMSGSIZE);
        }
        self.taken.push(len.div_ceil(each));
        Ok(())
    }

    fn wait(&mut self) {
        self.waits += 1;
    }
}

fn remote(n: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, n))
}

const TEN: [u8; 1000] = [7; 1000];

fn send_ten(sender: &mut Sender, fake: &mut Fake, now: Now) -> Sent {
    sender.send(fake, remote(1), &[IoSlice::new(&TEN)], 100, now)
}

#[test]
fn a_full_buffer_is_waited_for_once_and_then_by_nobody_until_something_goes() {
    for errno in [Errno::EAGAIN, Errno::ENOBUFS, Errno::ENOMEM] {
        for trains in [true, false] {
            let (mut sender, mut fake) = (Sender::new(trains), Fake::default());
            // Full for a moment: nothing is lost.
            fake.answers = vec![errno, Errno::EINTR];
            let sent = send_ten(&mut sender, &mut fake, Now(1));
            assert_eq!((sent.sent, sent.failed, sent.waited, fake.waits), (10, 0, true, 1), "{errno}");
            // Full for long: one wait, however much there is to send; and a name for what is lost.
            fake.answers = vec![errno; 100];
            for (n, waits) in [(1, 2), (2, 2), (3, 2)] {
                let sent = send_ten(&mut sender, &mut fake, Now(n));
                assert_eq!((sent.sent, sent.failed, sent.error), (0, 10, Some(SendError::Full)), "{errno}");
                assert_eq!(fake.waits, waits, "{errno}");
            }
            // It goes again, so that the next is worth a wait again.
            fake.answers.clear();
            assert_eq!(send_ten(&mut sender, &mut fake, Now(4)).sent, 10);
            fake.answers = vec![errno];
            assert_eq!(send_ten(&mut sender, &mut fake, Now(5)).sent, 10);
            assert_eq!(fake.waits, 3, "{errno}");
            assert_eq!(
                send_ten(&mut sender, &mut fake, Now(6)).as_train,
                trains,
                "a full buffer says nothing of trains"
            );
        }
    }
}

#[test]
fn a_refused_train_goes_one_by_one_and_is_not_tried_again_for_a_while() {
    for errno in [Errno::EIO, Errno::EINVAL, Errno::EOPNOTSUPP, Errno::EMSGSIZE] {
        let (mut sender, mut fake) = (Sender::new(true), Fake { trains: Some(errno), ..Fake::default() });
        let sent = send_ten(&mut sender, &mut fake, Now(1));
        assert_eq!(sent, Sent { sent: 10, ..Sent::default() }, "{errno}");
        assert_eq!((fake.calls, fake.taken.len()), (11, 10), "{errno}");
        send_ten(&mut sender, &mut fake, Now(2));
        assert_eq!(fake.calls, 21, "{errno}: remembered");
        fake.trains = None;
        assert!(!send_ten(&mut sender, &mut fake, Now(3)).as_train);
        let elsewhere = sender.send(&mut fake, remote(2), &[IoSlice::new(&TEN)], 100, Now(3));
        assert!(elsewhere.as_train, "another way");
        assert!(send_ten(&mut sender, &mut fake, Now(1) + REFUSED_FOR).as_train, "tried again");
    }
}

#[test]
fn what_is_too_long_also_alone_says_nothing_about_trains() {
    for errno in [Errno::EINVAL, Errno::EMSGSIZE] {
        let (mut sender, mut fake) =
            (Sender::new(true), Fake { trains: Some(errno), longest: Some(99), ..Fake::default() });
        let sent = sender.send(&mut fake, remote(1), &[IoSlice::new(&TEN[..950])], 100, Now(1));
        assert_eq!((sent.sent, sent.failed, sent.error), (1, 9, Some(SendError::TooBig)), "{errno}");
        fake = Fake::default();
        assert!(send_ten(&mut sender, &mut fake, Now(2)).as_train, "{errno}");
    }
    // Other errors are the same for each datagram, and not asked for one by one.
    let (mut sender, mut fake) = (Sender::new(true), Fake { trains: Some(Errno::ENETUNREACH), ..Fake::default() });
    let sent = send_ten(&mut sender, &mut fake, Now(1));
    assert_eq!((sent.failed, sent.error, fake.calls), (10, Some(SendError::Unreachable), 1));
}

#[test]
fn refusals_are_remembered_in_bounded_memory() {
    let (mut sender, mut fake) = (Sender::new(true), Fake { trains: Some(Errno::EIO), ..Fake::default() });
    let refuse = |sender: &mut Sender, fake: &mut Fake, n: usize, now| {
        let to = SocketAddr::from((Ipv4Addr::from_bits(n as u32), 9));
        sender.send(fake, to, &[IoSlice::new(&TEN)], 500, now)
    };
    for n in 0..REFUSALS {
        refuse(&mut sender, &mut fake, n, Now(1));
    }
    assert_eq!(sender.refusals(), REFUSALS);
    // Those that are over make room first.
    refuse(&mut sender, &mut fake, REFUSALS, Now(1) + REFUSED_FOR);
    assert_eq!(sender.refusals(), 1);
    for n in 0..2 * REFUSALS {
        refuse(&mut sender, &mut fake, n, Now(2) + REFUSED_FOR);
        assert!(sender.refusals() <= REFUSALS);
    }
}

/// More datagrams than a kernel cuts.
#[test]
fn a_train_that_this_kernel_refuses_arrives_all_the_same() {
    let ((a, _), (b, _)) = (open(false).unwrap(), open(false).unwrap());
    enlarge_buffers(&b, 1 << 20);
    let to = b.local_addr().unwrap();
    let mut sender = Sender::new(true);
    let mut way = Way { socket: a.as_fd(), to, from: None, ecn: 0 };
    let sent = sender.send(&mut way, to, &[IoSlice::new(&TEN)], 5, Now(1));
    assert_eq!(sent, Sent { sent: 200, ..Sent::default() });
    assert_eq!(receive(&b, 1000).0.len(), 200);
    assert_eq!(sender.refusals(), 1);
}

/// The real thing: datagrams to a neighbour that does not answer stay in the socket's buffer, which is as small as it gets.
#[test]
fn a_tiny_send_buffer_fills_and_the_rest_is_refused_after_one_wait() {
    let run = |args: &[&str]| std::process::Command::new("ip").args(args).status().is_ok_and(|status| status.success());
    let test = move || -> Option<Vec<Sent>> {
        // Of this thread alone, and gone with it.
        unshare(CloneFlags::CLONE_NEWNET).ok()?;
        let made = run(&["link", "add", "here", "type", "veth", "peer", "name", "there"])
            && run(&["addr", "add", "192.0.2.1/24", "dev", "here"])
            && run(&["link", "set", "here", "up"])
            && run(&["link", "set", "there", "up"]);
        let socket = UdpSocket::bind("192.0.2.1:0").ok().filter(|_| made)?;
        socket.set_nonblocking(true).unwrap();
        setsockopt(&socket, sockopt::SndBuf, &1).unwrap();
        let to = SocketAddr::from(([192, 0, 2, 2], 9));
        let mut sender = Sender::new(false);
        let all = (0..10).map(|n| {
            let mut way = Way { socket: socket.as_fd(), to, from: None, ecn: 0 };
            sender.send(&mut way, to, &[IoSlice::new(&TEN), IoSlice::new(&TEN)], 500, Now(n))
        });
        Some(all.collect())
    };
    let Some(all) = std::thread::spawn(test).join().unwrap() else {
        eprintln!("SKIPPED: no right to make a network namespace, or no `ip`");
        return;
    };
    let (sent, failed) = all.iter().fold((0, 0), |(sent, failed), each| (sent + each.sent, failed + each.failed));
    assert_eq!(sent + failed, 40);
    assert!(sent > 0 && failed > 20, "{sent} sent, {failed} failed");
    assert_eq!(all.iter().filter(|each| each.waited).count(), 1, "one wait: {all:?}");
    assert!(all.iter().all(|each| each.error.is_none_or(|error| error == SendError::Full)), "{all:?}");
}
