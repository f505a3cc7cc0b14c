/* Sends one prepared HTTP/1.1 request again and again, on a schedule.

   open_loop PORT FILE SECONDS RATE SEED CONNECTIONS

   open_loop.py builds and runs this, and says what for. FILE holds head and body as they
   are sent. RATE requests a second are due evenly, or with a SEED that is not 0 as a
   Poisson process has them; RATE 0 is a closed loop: on each connection an answer is
   followed by the next request. CONNECTIONS are opened before the clock starts, others
   where none is free. Prints how many there were, then a line for each request: seconds
   from the start when it was due, ms after that when it was sent and when its answer had
   come whole, and the status, 0 where the connection ended first and -1 where there was
   no answer LINGER after the last request.

   Linux only. What goes wrong here, not there, ends it with a message. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 1000, HEAD = 4096, BROKEN = 0, UNANSWERED = -1 };
static const double LINGER = 10.0, NEVER = 1e12;

typedef struct {
    int fd;            /* -1: none */
    bool asked;        /* a request is not answered yet */
    bool closes;       /* after this answer */
    double due, sent;  /* of the request */
    size_t written;    /* of the request, in bytes */
    char head[HEAD];   /* of the answer, as far as it came */
    size_t came;
    size_t missing;    /* bytes of the answer's body; counts once `status` is known */
    int status;        /* 0: the head is not whole */
} Connection;

static Connection connections[MOST];
static int unused[MOST], unused_count;  /* open, and nothing to do */
static int open_count, opened;
static const char *request;
static size_t request_size;
static int poll_fd;
static struct sockaddr_in address;
static bool is_closed_loop;
static double start, end;

static double *due_ones;  /* a queue of those that wait for a connection */
static size_t first_due, due_count, due_room;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* Printed at the end: a write in between would take time from what is measured. */
static struct { double due, late, latency; int status; } *samples;
static size_t sample_count, sample_room;

static void *grown(void *what, size_t *room, size_t size) {
    *room = *room ? 2 * *room : 4096;
    what = realloc(what, *room * size);
    if (what == NULL) err(1, "no memory");
    return what;
}

static void note(double due, double sent, double at, int status) {
    if (sample_count == sample_room)
        samples = grown(samples, &sample_room, sizeof *samples);
    samples[sample_count].due = due - start;
    samples[sample_count].late = (sent - due) * 1e3;
    samples[sample_count].latency = (at - due) * 1e3;
    samples[sample_count++].status = status;
}

static bool open_one(Connection *connection) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
    if (fd < 0) err(1, "socket");
    opened++;
    /* On loopback this is answered at once. */
    if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0) {
        close(fd);
        return false;
    }
    fcntl(fd, F_SETFL, O_NONBLOCK);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct epoll_event both = {.events = EPOLLIN | EPOLLOUT | EPOLLET};
    both.data.ptr = connection;
    if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &both) < 0) err(1, "epoll_ctl");
    memset(connection, 0, sizeof *connection);
    connection->fd = fd;
    connection->written = request_size;
    open_count++;
    return true;
}

static void shut(Connection *connection) {
    close(connection->fd);
    connection->fd = -1;
    open_count--;
}

static void write_on(Connection *connection) {
    while (connection->written < request_size) {
        ssize_t sent = send(connection->fd, request + connection->written,
                            request_size - connection->written, MSG_NOSIGNAL);
        if (sent < 0) return;  /* later, or reading will tell why */
        connection->written += (size_t)sent;
    }
}

static void send_on(Connection *connection, double due) {
    connection->asked = true;
    connection->due = due;
    connection->sent = now();
    connection->written = connection->came = 0;
    connection->status = 0;
    write_on(connection);
}

/* Sends what is due, on a free connection or on a new one, or has it wait. */
static void ask(double due) {
    if (unused_count) {
        send_on(&connections[unused[--unused_count]], due);
        return;
    }
    for (int at = 0; open_count < MOST && at < MOST; at++)
        if (connections[at].fd < 0) {
            if (open_one(&connections[at]))
                send_on(&connections[at], due);
            else
                note(due, now(), now(), BROKEN);
            return;
        }
    if (due_count == due_room) due_ones = grown(due_ones, &due_room, sizeof *due_ones);
    due_ones[due_count++] = due;
}

/* The connection has nothing to do: the next request, if one is to be sent. */
static void go_on(Connection *connection) {
    double time = now();
    if (is_closed_loop && time < end)
        connection->fd < 0 ? ask(time) : send_on(connection, time);
    else if (first_due < due_count)
        connection->fd < 0 ? ask(due_ones[first_due++])
                           : send_on(connection, due_ones[first_due++]);
    else if (connection->fd >= 0)
        unused[unused_count++] = (int)(connection - connections);
}

static void has_ended(Connection *connection, int status) {
    note(connection->due, connection->sent, now(), status);
    connection->asked = false;
    if (connection->closes) shut(connection);
    /* The rest of a request that is answered already is still sent. */
    if (connection->fd < 0 || connection->written == request_size) go_on(connection);
}

static void is_lost(Connection *connection) {
    if (connection->asked) {
        connection->closes = true;
        has_ended(connection, BROKEN);
        return;
    }
    for (int at = 0; at < unused_count; at++)
        if (unused[at] == connection - connections) unused[at] = unused[--unused_count];
    bool was_sending = connection->written < request_size;
    shut(connection);
    if (was_sending) go_on(connection);
}

/* Reads an answer's status and length. */
static void take_head(Connection *connection) {
    char *head = connection->head;
    head[connection->came] = 0;
    char *body = strstr(head, "\r\n\r\n");
    if (body == NULL) {
        if (connection->came == HEAD - 1) errx(1, "an answer's head is too large");
        return;
    }
    body[2] = 0;
    char *length = strcasestr(head, "\r\ncontent-length:");
    if (length == NULL) errx(1, "an answer without a length: %.300s", head);
    connection->status = atoi(head + strlen("HTTP/1.1 "));
    connection->closes = strcasestr(head, "\r\nconnection: close\r\n") != NULL;
    size_t of_body = connection->came - (size_t)(body + 4 - head);
    connection->missing = strtoul(length + strlen("\r\ncontent-length:"), NULL, 10);
    if (of_body > connection->missing) errx(1, "an answer longer than it says");
    connection->missing -= of_body;
}

static void read_on(Connection *connection) {
    static char scratch[65536];
    while (connection->fd >= 0) {
        bool in_head = connection->asked && connection->status == 0;
        char *to = in_head ? connection->head + connection->came : scratch;
        size_t room = in_head ? HEAD - 1 - connection->came : sizeof scratch;
        ssize_t count = recv(connection->fd, to, room, 0);
        if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (count <= 0) {
            is_lost(connection);
            return;
        }
        if (!connection->asked) errx(1, "an answer to no request");
        if (in_head) {
            connection->came += (size_t)count;
            take_head(connection);
        } else {
            connection->missing -= (size_t)count;
        }
        if (connection->status && connection->missing == 0) {
            has_ended(connection, connection->status);
            return;  /* what comes later is another event */
        }
    }
}

static char *contents(const char *path, size_t *size) {
    FILE *file = fopen(path, "r");
    struct stat found;
    if (file == NULL || fstat(fileno(file), &found) < 0) err(1, "%s", path);
    *size = (size_t)found.st_size;
    char *all = malloc(*size);
    if (all == NULL || fread(all, 1, *size, file) != *size) err(1, "%s", path);
    fclose(file);
    return all;
}

static void set_timer(int timer, double at) {
    struct itimerspec due = {.it_value.tv_sec = (time_t)at};
    due.it_value.tv_nsec = (long)((at - (double)due.it_value.tv_sec) * 1e9);
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &due, NULL);
}

int main(int count, char **given) {
    if (count != 7) errx(2, "PORT FILE SECONDS RATE SEED CONNECTIONS");
    address.sin_family = AF_INET;
    address.sin_port = htons((uint16_t)atoi(given[1]));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    request = contents(given[2], &request_size);
    double seconds = atof(given[3]), rate = atof(given[4]);
    long seed = atol(given[5]);
    int wanted = atoi(given[6]);
    if (wanted < 1 || wanted > MOST) errx(2, "CONNECTIONS: 1 to %d", MOST);
    is_closed_loop = rate == 0;
    srand48(seed);

    poll_fd = epoll_create1(EPOLL_CLOEXEC);
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct epoll_event ticks = {.events = EPOLLIN, .data.ptr = NULL};
    if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, timer, &ticks) < 0) err(1, "epoll_ctl");
    for (int at = 0; at < MOST; at++) connections[at].fd = -1;
    for (int at = 0; at < wanted; at++) {
        if (!open_one(&connections[at])) err(1, "connect");
        unused[unused_count++] = at;
    }
    /* Before all that compute, where it may be: a client on another machine waits for
       none of the server's processors. Permitted to root. */
    struct sched_param first = {.sched_priority = 1};
    sched_setscheduler(0, SCHED_FIFO, &first);
    /* Otherwise the first requests pay for how the server begins each connection. */
    usleep(200000);

    start = now();
    end = start + seconds;
    double next = is_closed_loop ? NEVER : start;
    for (int left = is_closed_loop ? wanted : 0; left; left--) ask(now());
    for (;;) {
        double time = now();
        while (next <= time && next < end) {
            ask(next);
            next += seed ? -log(1 - drand48()) / rate : 1 / rate;
        }
        bool is_over = time >= end && first_due == due_count;
        for (int at = 0; is_over && at < MOST; at++)
            is_over = connections[at].fd < 0 || !connections[at].asked;
        if (is_over || time >= end + LINGER) break;
        set_timer(timer, next < end ? next : time < end ? end : end + LINGER);
        struct epoll_event events[64];
        int ready = epoll_wait(poll_fd, events, 64, -1);
        for (int at = 0; at < ready; at++) {
            Connection *connection = events[at].data.ptr;
            uint64_t expired;
            if (connection == NULL) {
                if (read(timer, &expired, sizeof expired) < 0) continue;
            } else if (connection->fd >= 0) {
                bool was_whole = connection->written == request_size;
                write_on(connection);
                bool is_whole = connection->written == request_size;
                if (!was_whole && is_whole && !connection->asked) go_on(connection);
                if (events[at].events & ~(uint32_t)EPOLLOUT) read_on(connection);
            }
        }
    }
    double time = now();
    for (int at = 0; at < MOST; at++)
        if (connections[at].fd >= 0 && connections[at].asked)
            note(connections[at].due, connections[at].sent, time, UNANSWERED);
    while (first_due < due_count) note(due_ones[first_due++], time, time, UNANSWERED);
    printf("%d\n", opened);
    for (size_t at = 0; at < sample_count; at++)
        printf("%.6f %.3f %.3f %d\n", samples[at].due, samples[at].late,
               samples[at].latency, samples[at].status);
    return 0;
}
