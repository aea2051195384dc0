// Memory that ends directly before an inaccessible page, so that a read or write of one element too many ends
// the test, in any build and for any instruction (AddressSanitizer does not detect masked vector accesses).
// Under AddressSanitizer the bytes before it are poisoned too.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace cnk::test {

class Buffer {
 public:
  // Filled with NaN (all bits set, in every dtype). If `bytes` is
  // no multiple of `alignment`, there are unused bytes at the end.
  explicit Buffer(int64_t bytes, int64_t alignment = 1) : bytes_(bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    mapped_ = (bytes + page - 1) / page * page + page;
    void* base = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) fail("mmap");
    base_ = static_cast<char*>(base);
    char* const end = base_ + mapped_ - page;
    if (mprotect(end, page, PROT_NONE) != 0) fail("mprotect");
    data_ = end - (bytes + alignment - 1) / alignment * alignment;
    std::memset(data_, 0xff, bytes);
    ASAN_POISON_MEMORY_REGION(base_, data_ - base_);
    ASAN_POISON_MEMORY_REGION(data_ + bytes, end - data_ - bytes);
  }
  ~Buffer() {
    if (!base_) return;
    ASAN_UNPOISON_MEMORY_REGION(base_, mapped_);
    munmap(base_, mapped_);
  }
  Buffer(Buffer&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)),
        data_(other.data_),
        bytes_(other.bytes_),
        mapped_(other.mapped_) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(base_, other.base_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(mapped_, other.mapped_);
    return *this;
  }

  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data_);
  }
  template <class T>
  const T* as() const {
    return reinterpret_cast<const T*>(data_);
  }
  int64_t bytes() const { return bytes_; }

 private:
  [[noreturn]] static void fail(const char* what) {
    std::perror(what);
    std::abort();
  }
  char *base_, *data_;
  int64_t bytes_, mapped_;
};

}  // namespace cnk::test
