// What PyTorch's threads do while a step runs. After an operation that was shared out, libgomp's spin for some ten
// milliseconds in case another comes: dozens of steps of a small model, on the cores that those need.
#pragma once

#include <dlfcn.h>
#include <pthread.h>

#include <fstream>
#include <limits>
#include <string>

namespace benthic {

// Whether this process was forked off and goes on with its parent's memory: the threads that OpenMP knows of may then be
// its parent's, and would be waited for without end. Linux tells by a flag of the process (PF_FORKNOEXEC).
inline bool goes_on_with_a_parents_memory() {
    std::ifstream stat("/proc/self/stat");
    stat.ignore(std::numeric_limits<std::streamsize>::max(), ')');  // the end of the program's name
    std::string field;
    for (int i = 0; i < 6; ++i) stat >> field;  // state, parent, group, session, terminal, its group
    unsigned long flags = 0;
    stat >> flags;
    return !stat || (flags & 0x40) != 0;
}

inline bool forked_off = goes_on_with_a_parents_memory();
static const int kWatch = pthread_atfork(nullptr, nullptr, [] { forked_off = true; });

// Lets the threads rest that OpenMP keeps for whoever calls. libgomp ends them and makes others when they are wanted: 40
// microseconds for two threads, nothing if there are none. Nothing happens where PyTorch's OpenMP is older than 5.0.
inline void rest_openmp_threads() {
    static const auto rest = reinterpret_cast<int (*)(int)>(dlsym(RTLD_DEFAULT, "omp_pause_resource_all"));
    constexpr int kSoft = 1;  // omp_pause_soft
    if (rest != nullptr && !forked_off) rest(kSoft);
}

}  // namespace benthic
