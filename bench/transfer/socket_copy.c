// What plain sockets do with the same work: memory of one process, block by block in random order, into memory of
// another over loopback, on a number of connections. Prints bytes per second, from the first byte to the last.
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static size_t block_bytes, num_blocks;
static int streams;
static char* memory;
static size_t* order;
static struct sockaddr_in address = {.sin_family = AF_INET};

static void fail(const char* what) {
  perror(what);
  exit(1);
}

static void prepare(unsigned seed) {
  memory = mmap(0, block_bytes * num_blocks, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("mmap");
  madvise(memory, block_bytes * num_blocks, MADV_HUGEPAGE);
  memset(memory, 1, block_bytes * num_blocks);
  order = malloc(num_blocks * sizeof *order);
  srand(seed);
  for (size_t i = 0; i < num_blocks; ++i) {
    size_t j = rand() % (i + 1);
    order[i] = order[j];
    order[j] = i;
  }
}

static void* send_stream(void* index) {
  int sock = socket(AF_INET, SOCK_STREAM, 0), one = 1;
  setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  if (connect(sock, (struct sockaddr*)&address, sizeof address)) fail("connect");
  for (size_t i = (size_t)index; i < num_blocks; i += streams)
    for (size_t done = 0; done < block_bytes;) {
      ssize_t sent = send(sock, memory + order[i] * block_bytes + done, block_bytes - done, 0);
      if (sent <= 0) fail("send");
      done += sent;
    }
  close(sock);
  return 0;
}

struct Stream {
  int sock;
  size_t index;
};

static void* recv_stream(void* given) {
  struct Stream* stream = given;
  for (size_t i = stream->index; i < num_blocks; i += streams)
    for (size_t done = 0; done < block_bytes;) {
      ssize_t got = recv(stream->sock, memory + order[i] * block_bytes + done, block_bytes - done, 0);
      if (got <= 0) fail("recv");
      done += got;
    }
  return 0;
}

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  streams = atoi(argv[1]);
  block_bytes = strtoull(argv[2], 0, 10);
  num_blocks = strtoull(argv[3], 0, 10) / block_bytes;
  int listener = socket(AF_INET, SOCK_STREAM, 0);
  socklen_t length = sizeof address;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (bind(listener, (struct sockaddr*)&address, sizeof address) || listen(listener, 64)) fail("listen");
  getsockname(listener, (struct sockaddr*)&address, &length);
  int ready[2];
  if (pipe(ready)) fail("pipe");
  pid_t child = fork();
  pthread_t threads[64];
  if (child == 0) {
    prepare(1);
    char byte;
    if (read(ready[0], &byte, 1) != 1) fail("read");
    for (size_t i = 0; i < (size_t)streams; ++i) pthread_create(&threads[i], 0, send_stream, (void*)i);
    for (int i = 0; i < streams; ++i) pthread_join(threads[i], 0);
    exit(0);
  }
  prepare(2);
  struct timespec begin, end;
  clock_gettime(CLOCK_MONOTONIC, &begin);
  if (write(ready[1], "g", 1) != 1) fail("write");
  struct Stream given[64];
  for (int i = 0; i < streams; ++i) {
    given[i].sock = accept(listener, 0, 0);
    given[i].index = i;
    if (i == 0) clock_gettime(CLOCK_MONOTONIC, &begin);  // the child has prepared its memory by now
    pthread_create(&threads[i], 0, recv_stream, &given[i]);
  }
  for (int i = 0; i < streams; ++i) pthread_join(threads[i], 0);
  clock_gettime(CLOCK_MONOTONIC, &end);
  printf("%.0f\n", (double)block_bytes * num_blocks / (end.tv_sec - begin.tv_sec + (end.tv_nsec - begin.tv_nsec) * 1e-9));
  int status;
  waitpid(child, &status, 0);
  return status != 0;
}
