// Memory of large tensors, kept by the process and joined as it is freed.
//
// A training step allocates and frees the same hundreds of megabytes each time. From glibc, they either go back to the
// system, which must zero every page again, or stay in a heap whose holes aligned blocks of the same size do not fit
// into. Here a block is cut from the smallest hole that holds it, and a freed one is joined with its neighbours; what
// has been resident once stays so. Small tensors stay with the allocator that was there before.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace {

constexpr size_t kSmallest = size_t(1) << 18;  // bytes of the smallest block from here
constexpr size_t kGrain = 4096;                // blocks begin and end on pages

class Arena final : public c10::Allocator {
 public:
  Arena(char* base, size_t bytes, c10::Allocator* before) : begin_(base), end_(base + bytes), top_(base), before_(before) {}

  c10::DataPtr allocate(size_t bytes) override {
    char* block = bytes < kSmallest ? nullptr : take(bytes);
    if (!block) return before_->allocate(bytes);
    return {block, block, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  using Hole = std::pair<size_t, char*>;  // bytes, where

  static void release(void* block);

  // A block of at least so many bytes; null if all of the address space is in use.
  char* take(size_t bytes) {
    if (bytes > size_t(end_ - begin_)) return nullptr;
    bytes = (bytes + kGrain - 1) / kGrain * kGrain;
    std::lock_guard<std::mutex> guard(lock_);
    char* block = from_hole(bytes);
    if (!block) block = from_top(bytes);
    if (block) used_[block] = bytes;
    return block;
  }

  char* from_hole(size_t bytes) {
    auto best = by_size_.lower_bound({bytes, nullptr});
    if (best == by_size_.end()) return nullptr;
    auto [size, block] = *best;
    remove(size, block);
    if (size > bytes) add(size - bytes, block + bytes);
    return block;
  }

  // Beyond all that was ever used, beginning with the hole before it, if there is one.
  char* from_top(size_t bytes) {
    char* block = top_;
    if (!by_place_.empty()) {
      auto last = std::prev(by_place_.end());
      if (last->first + last->second == top_) block = last->first;
    }
    if (bytes > size_t(end_ - block)) return nullptr;
    if (block != top_) remove(size_t(top_ - block), block);
    top_ = block + bytes;
    return block;
  }

  void give_back(char* block) {
    std::lock_guard<std::mutex> guard(lock_);
    auto known = used_.find(block);
    size_t bytes = known->second;
    used_.erase(known);
    auto next = by_place_.lower_bound(block);
    if (next != by_place_.end() && block + bytes == next->first) {
      size_t more = next->second;
      char* place = next->first;
      remove(more, place);
      bytes += more;
    }
    auto after = by_place_.lower_bound(block);
    if (after != by_place_.begin()) {
      auto [place, size] = *std::prev(after);
      if (place + size == block) {
        remove(size, place);
        block = place;
        bytes += size;
      }
    }
    add(bytes, block);
  }

  void add(size_t bytes, char* block) {
    by_size_.insert({bytes, block});
    by_place_[block] = bytes;
  }

  void remove(size_t bytes, char* block) {
    by_size_.erase({bytes, block});
    by_place_.erase(block);
  }

  char *begin_, *end_, *top_;
  c10::Allocator* before_;
  std::mutex lock_;
  std::set<Hole> by_size_;
  std::map<char*, size_t> by_place_;
  std::unordered_map<char*, size_t> used_;
};

Arena* arena = nullptr;

void Arena::release(void* pointer) {
  char* block = static_cast<char*>(pointer);
  if (block >= arena->begin_ && block < arena->end_) {
    arena->give_back(block);
  } else {
    arena->before_->raw_deleter()(pointer);
  }
}

}  // namespace

// From now on, large tensors on the CPU come from an arena of at most so many bytes, which is never given back.
// 0 if the system does not lend so much address space.
extern "C" int use_arena(int64_t bytes) {
  if (arena) return 1;
  void* base = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return 0;
  arena = new Arena(static_cast<char*>(base), size_t(bytes), c10::GetCPUAllocator());
  c10::SetCPUAllocator(arena, 1);
  return 1;
}
