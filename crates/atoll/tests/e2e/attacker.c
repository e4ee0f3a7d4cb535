/* What a workload with CAP_NET_RAW can try, and what its victims see of it.
 *
 *   attacker ear                                   prints the marks of attacks in all frames that arrive
 *   attacker strike OWN VICTIM STRANGER OWN6 VICTIM6 STRANGER6   sends them, then LAST to the victim
 *   attacker scan ADDRESS...                       prints each TCP port that lets itself be connected to
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

typedef unsigned char byte;

static int raw, link_index;
static byte own_mac[6];
static const byte router_mac[6] = {0x0a, 0x58, 169, 254, 1, 1};
static const byte everyone[6] = {255, 255, 255, 255, 255, 255};
static const byte all_nodes[6] = {0x33, 0x33, 0, 0, 0, 1};

static void open_raw(void) {
    struct ifreq request = {0};
    raw = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL));
    strcpy(request.ifr_name, "eth0");
    if (raw < 0 || ioctl(raw, SIOCGIFINDEX, &request) < 0) { perror("packet socket"); exit(1); }
    link_index = request.ifr_ifindex;
    if (ioctl(raw, SIOCGIFHWADDR, &request) < 0) { perror("MAC address"); exit(1); }
    memcpy(own_mac, request.ifr_hwaddr.sa_data, 6);
}

static void frame(const byte *to, const byte *from, int kind, const byte *payload, int length) {
    byte out[2048];
    memcpy(out, to, 6);
    memcpy(out + 6, from, 6);
    out[12] = kind >> 8;
    out[13] = kind;
    memcpy(out + 14, payload, length);
    struct sockaddr_ll address = {.sll_family = AF_PACKET, .sll_ifindex = link_index, .sll_halen = 6};
    if (sendto(raw, out, 14 + length, 0, (struct sockaddr *)&address, sizeof address) < 0) perror("send");
}

static unsigned sum(const byte *at, int length, unsigned total) {
    for (int i = 0; i < length; i++) total += i % 2 ? at[i] : at[i] << 8;
    return total;
}

static unsigned fold(unsigned total) {
    while (total >> 16) total = (total & 0xffff) + (total >> 16);
    return ~total & 0xffff;
}

static void put16(byte *at, unsigned value) { at[0] = value >> 8; at[1] = value; }

static int udp(byte *out, int from_port, int to_port, const char *text) {
    int length = 8 + strlen(text);
    put16(out, from_port); put16(out + 2, to_port); put16(out + 4, length); put16(out + 6, 0);
    memcpy(out + 8, text, length - 8);
    return length;
}

static int ip4(byte *out, in_addr_t from, in_addr_t to, int protocol, int fragment, const byte *options, int optlen,
               const byte *payload, int length) {
    int header = 20 + optlen;
    memset(out, 0, header);
    out[0] = 0x40 | header / 4;
    put16(out + 2, header + length); put16(out + 4, 77); put16(out + 6, fragment);
    out[8] = 64; out[9] = protocol;
    memcpy(out + 12, &from, 4); memcpy(out + 16, &to, 4);
    if (optlen) memcpy(out + 20, options, optlen);
    put16(out + 10, fold(sum(out, header, 0)));
    memcpy(out + header, payload, length);
    return header + length;
}

static int ip6(byte *out, const byte *from, const byte *to, int next, const byte *payload, int length) {
    memset(out, 0, 40);
    out[0] = 0x60; put16(out + 4, length); out[6] = next; out[7] = 255;
    memcpy(out + 8, from, 16); memcpy(out + 24, to, 16);
    memcpy(out + 40, payload, length);
    return 40 + length;
}

static int icmp6(byte *out, const byte *from, const byte *to, byte *message, int length) {
    put16(message + 2, 0);
    unsigned total = sum(from, 16, 0);
    total = sum(to, 16, total) + 58 + length;
    put16(message + 2, fold(sum(message, length, total)));
    return ip6(out, from, to, 58, message, length);
}

static void datagram4(const byte *to_mac, const byte *mac, in_addr_t from, in_addr_t to, int port, const char *text) {
    byte body[512], out[1024];
    int length = udp(body, 4000, port, text);
    frame(to_mac, mac, 0x0800, out, ip4(out, from, to, 17, 0, 0, 0, body, length));
}

static void datagram6(const byte *mac, const byte *from, const byte *to, const char *text) {
    byte body[512], out[1024];
    int length = udp(body, 4000, 99, text);
    unsigned total = sum(from, 16, 0);
    total = sum(to, 16, total) + 17 + length;
    put16(body + 6, fold(sum(body, length, total)));
    frame(router_mac, mac, 0x86dd, out, ip6(out, from, to, 17, body, length));
}

static void claim4(in_addr_t claimed, in_addr_t asked, const byte *to) {
    byte packet[60] = {0, 1, 8, 0, 6, 4, 0, 1};
    for (int operation = 1; operation <= 2; operation++) {
        packet[7] = operation;
        memcpy(packet + 8, own_mac, 6); memcpy(packet + 14, &claimed, 4);
        memcpy(packet + 18, router_mac, 6); memcpy(packet + 24, &asked, 4);
        strcpy((char *)packet + 30, "ATTACK-arp");
        frame(to, own_mac, 0x0806, packet, sizeof packet);
    }
}

static void claim6(const byte *claimed, const byte *to_mac, const byte *to) {
    byte message[64] = {136, 0, 0, 0, 0xa0}, out[256];
    memcpy(message + 8, claimed, 16);
    message[24] = 2; message[25] = 1; memcpy(message + 26, own_mac, 6);
    message[32] = 253; message[33] = 4; strcpy((char *)message + 34, "ATTACK-na");
    frame(to_mac, own_mac, 0x86dd, out, icmp6(out, claimed, to, message, sizeof message));
}

static void advertise_router(const byte *from) {
    byte to[16] = {0xff, 2, [15] = 1}, out[256];
    byte message[48] = {134, 0, 0, 0, 64, 0, 7, 8};
    message[16] = 253; message[17] = 4; strcpy((char *)message + 18, "ATTACK-ra");
    frame(all_nodes, own_mac, 0x86dd, out, icmp6(out, from, to, message, sizeof message));
}

/* What the router alone may send, from one's own addresses to a neighbour that may be spoken to. */
static void announce(in_addr_t own, in_addr_t victim, const byte *own6, const byte *victim6) {
    byte body[256], out[512], message[64] = {134, 0, 0, 0, 64, 0, 7, 8};
    for (int kind = 5; kind <= 9; kind += 4) {
        memset(body, 0, sizeof body);
        body[0] = kind; body[1] = 1;
        memcpy(body + 4, &own, 4);
        ip4(body + 8, victim, inet_addr("203.0.113.1"), 17, 0, 0, 0, body + 200, 8);
        strcpy((char *)body + 40, "ATTACK-redirect");
        put16(body + 2, fold(sum(body, 60, 0)));
        frame(router_mac, own_mac, 0x0800, out, ip4(out, own, victim, 1, 0, 0, 0, body, 60));
    }
    message[16] = 253; message[17] = 4; strcpy((char *)message + 18, "ATTACK-ra-to-one");
    frame(router_mac, own_mac, 0x86dd, out, icmp6(out, own6, victim6, message, 48));
    memset(message, 0, sizeof message);
    message[0] = 137;
    memcpy(message + 8, own6, 16); memcpy(message + 24, own6, 16);
    message[40] = 4; message[41] = 3; strcpy((char *)message + 48, "ATTACK-redir-6");
    frame(router_mac, own_mac, 0x86dd, out, icmp6(out, own6, victim6, message, 64));
    int length = udp(body, 547, 546, "ATTACK-dhcp-6");
    unsigned total = sum(own6, 16, 0);
    total = sum(victim6, 16, total) + 17 + length;
    put16(body + 6, fold(sum(body, length, total)));
    frame(router_mac, own_mac, 0x86dd, out, ip6(out, own6, victim6, 17, body, length));
}

static void strike(char **arg) {
    in_addr_t own = inet_addr(arg[0]), victim = inet_addr(arg[1]), stranger = inet_addr(arg[2]);
    byte own6[16], victim6[16], stranger6[16], body[512], out[1024];
    inet_pton(AF_INET6, arg[3], own6); inet_pton(AF_INET6, arg[4], victim6); inet_pton(AF_INET6, arg[5], stranger6);
    in_addr_t gateway = inet_addr("169.254.1.1"), router = inet_addr("10.42.0.1"), any = INADDR_BROADCAST;
    in_addr_t lies[] = {victim, stranger, gateway, router, inet_addr("127.0.0.1"), inet_addr("203.0.113.1"), 0,
                        inet_addr("10.42.99.9")};
    byte macs[3][6] = {{0x0a, 0x58, 10, 42, 0, 99}, {0x0a, 0x58, 169, 254, 1, 1}, {2, 0, 0, 0, 0, 1}}, theirs[6];
    open_raw();
    for (unsigned i = 0; i < sizeof lies / sizeof *lies; i++)
        for (int to = 0; to < 2; to++)
            datagram4(router_mac, own_mac, lies[i], to ? stranger : victim, 99, "ATTACK-spoofed-address");
    for (int i = 0; i < 3; i++) datagram4(router_mac, macs[i], own, victim, 99, "ATTACK-spoofed-mac");
    memcpy(theirs, own_mac, 2);
    memcpy(theirs + 2, &victim, 4);
    datagram4(theirs, own_mac, own, victim, 99, "ATTACK-second-layer");
    datagram4(everyone, own_mac, own, victim, 99, "ATTACK-second-layer");
    for (unsigned i = 0; i < sizeof lies / sizeof *lies; i++) {
        claim4(lies[i], gateway, everyone); claim4(lies[i], victim, router_mac); claim4(lies[i], victim, theirs);
    }
    byte ack[300] = {2, 1, 6};
    memcpy(ack + 236, "\x63\x82\x53\x63\x35\x01\x05\xff", 8);
    strcpy((char *)ack + 250, "ATTACK-dhcp");
    put16(body, 67); put16(body + 2, 68); put16(body + 4, 8 + sizeof ack); put16(body + 6, 0);
    memcpy(body + 8, ack, sizeof ack);
    frame(everyone, own_mac, 0x0800, out, ip4(out, own, any, 17, 0, 0, 0, body, 8 + sizeof ack));
    frame(everyone, own_mac, 0x0800, out, ip4(out, own, victim, 17, 0, 0, 0, body, 8 + sizeof ack));
    frame(router_mac, own_mac, 0x0800, out, ip4(out, gateway, victim, 17, 0, 0, 0, body, 8 + sizeof ack));
    for (int n = 0; n < 3; n++) {
        frame(router_mac, own_mac, 0x0800, out, ip4(out, own, victim, 17, 0, 0, 0, body, 8 + sizeof ack));
        put16(body, 4000 + n);
    }
    datagram4(everyone, own_mac, own, inet_addr("224.0.0.251"), 5353, "ATTACK-multicast");
    const byte *addresses[] = {victim6, stranger6};
    byte local[16] = {0xfe, 0x80, [15] = 1}, group[16] = {0xff, 2, [15] = 1};
    for (int i = 0; i < 2; i++) {
        claim6(addresses[i], router_mac, local); claim6(addresses[i], all_nodes, group);
        datagram6(own_mac, addresses[!i], addresses[i], "ATTACK-spoofed-address-6");
    }
    claim6(local, all_nodes, group);
    advertise_router(local); advertise_router(own6);
    announce(own, victim, own6, victim6);
    in_addr_t hops[] = {gateway, router, victim};
    for (int i = 0; i < 3; i++)
        for (int kind = 131; kind <= 137; kind += 6) {
            byte options[8] = {1, kind, 7, 4};
            memcpy(options + 4, &stranger, 4);
            int length = udp(body, 4000, 99, "ATTACK-source-route");
            frame(router_mac, own_mac, 0x0800, out, ip4(out, own, hops[i], 17, 0, options, 8, body, length));
        }
    byte routing[128] = {17, 2, 0, 1};
    memcpy(routing + 8, stranger6, 16);
    int length = 24 + udp(routing + 24, 4000, 99, "ATTACK-routing-header");
    frame(router_mac, own_mac, 0x86dd, out, ip6(out, own6, victim6, 43, routing, length));
    /* The first piece says that it is for nobody's port, the second overlaps it; and pieces that begin at the end. */
    length = udp(body, 4000, 9, "ATTACK-fragment-ATTACK-fragment-ATTACK-fragment");
    frame(router_mac, own_mac, 0x0800, out, ip4(out, own, stranger, 17, 0x2000, 0, 0, body, 24));
    frame(router_mac, own_mac, 0x0800, out, ip4(out, own, stranger, 17, 0x2000 | 1, 0, 0, body, 24));
    frame(router_mac, own_mac, 0x0800, out, ip4(out, own, stranger, 17, 3, 0, 0, body + 24, length - 24));
    frame(router_mac, own_mac, 0x0800, out, ip4(out, own, stranger, 17, 100, 0, 0, body + 8, length - 8));
    /* Another namespace, honestly asked for. */
    datagram4(router_mac, own_mac, own, stranger, 99, "ATTACK-stranger");
    datagram6(own_mac, own6, stranger6, "ATTACK-stranger-6");
    datagram4(router_mac, own_mac, own, victim, 99, "LAST");
    datagram6(own_mac, own6, victim6, "LAST-6");
}

static void ear(void) {
    byte in[65536];
    open_raw();
    puts("listening");
    fflush(stdout);
    for (;;) {
        struct sockaddr_ll from = {0};
        socklen_t size = sizeof from;
        ssize_t length = recvfrom(raw, in, sizeof in - 1, 0, (struct sockaddr *)&from, &size);
        if (length < 0) continue;
        if (from.sll_pkttype == PACKET_OUTGOING) continue;
        in[length] = 0;
        /* ICMP errors quote what this pod sent itself: they are its refusals. */
        if (length > 54 && ((in[12] == 0x08 && in[13] == 0 && in[23] == 1) ||
                            (in[12] == 0x86 && in[13] == 0xdd && in[20] == 58 && in[54] < 128))) continue;
        for (ssize_t i = 0; i + 4 <= length; i++)
            if (!memcmp(in + i, "ATTACK", 6) || !memcmp(in + i, "LAST", 4)) {
                printf("%s\n", (char *)in + i);
                fflush(stdout);
                break;
            }
    }
}

static void scan(const char *text) {
    enum { AT_ONCE = 200 };
    struct sockaddr_storage to = {0};
    struct sockaddr_in *v4 = (struct sockaddr_in *)&to;
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&to;
    int six = strchr(text, ':') != 0;
    to.ss_family = six ? AF_INET6 : AF_INET;
    if (inet_pton(to.ss_family, text, six ? (void *)&v6->sin6_addr : (void *)&v4->sin_addr) != 1) exit(2);
    static const int high[] = {2379, 2380, 5000, 6443, 7443, 8080, 8443, 9090, 10250, 15001, 30000, 32767};
    int count = 1024 + sizeof high / sizeof *high;
    for (int first = 0; first < count; first += AT_ONCE) {
        struct pollfd open[AT_ONCE];
        int ports[AT_ONCE], many = count - first < AT_ONCE ? count - first : AT_ONCE;
        for (int i = 0; i < many; i++) {
            int n = first + i;
            ports[i] = n < 1024 ? n + 1 : high[n - 1024];
            if (six) v6->sin6_port = htons(ports[i]); else v4->sin_port = htons(ports[i]);
            open[i].fd = socket(to.ss_family, SOCK_STREAM | SOCK_NONBLOCK, 0);
            open[i].events = POLLOUT;
            connect(open[i].fd, (struct sockaddr *)&to, six ? sizeof *v6 : sizeof *v4);
        }
        for (int left = many, patience = 10; left > 0 && patience > 0 && poll(open, many, 200) >= 0; patience--)
            for (int i = 0; i < many; i++) {
                int error = 0;
                socklen_t size = sizeof error;
                if (open[i].fd < 0 || !open[i].revents) continue;
                getsockopt(open[i].fd, SOL_SOCKET, SO_ERROR, &error, &size);
                if (!error) printf("open %s %d\n", text, ports[i]);
                close(open[i].fd);
                open[i].fd = -1;
                left--;
            }
        for (int i = 0; i < many; i++) if (open[i].fd >= 0) close(open[i].fd);
    }
}

int main(int count, char **arg) {
    if (count == 2 && !strcmp(arg[1], "ear")) ear();
    else if (count == 8 && !strcmp(arg[1], "strike")) strike(arg + 2);
    else if (count > 2 && !strcmp(arg[1], "scan")) for (int i = 2; i < count; i++) scan(arg[i]);
    else return 2;
    puts("done");
    return 0;
}
