// A stream in C++: frames are submitted as they come, the newest reading is shown.  example_cpp BUNDLE [ENGINE_FOLDER]
// The frames are a bright disc that moves; a scanner hands in its own pixels.
#include <chrono>
#include <cstdio>
#include <thread>
#include <tinyusfm.hpp>
#include <vector>

int main(int count, char **words) {
    if (count < 2) {
        std::fprintf(stderr, "usage: %s BUNDLE [ENGINE_FOLDER]\n", words[0]);
        return 2;
    }
    try {
        tinyusfm::Options options;
        options.budget_ms = 1000;
        options.engine_folder = count > 2 ? words[2] : nullptr;
        tinyusfm::Session session(words[1], options);
        std::vector<uint8_t> pixels(400 * 600);
        for (int seq = 0; seq < 30; seq++) {
            for (int y = 0; y < 400; y++)
                for (int x = 0; x < 600; x++) {
                    int dy = y - 200, dx = x - 250 - 3 * seq;
                    pixels[static_cast<std::size_t>(600 * y + x)] = static_cast<uint8_t>(dy * dy + dx * dx < 10000 ? 200 : 20);
                }
            tinyusfm::Frame frame(pixels.data(), 400, 600);
            frame.spacing_row_mm = frame.spacing_column_mm = 0.3;
            frame.seq = seq;
            session.submit(frame);
            if (auto reading = session.newest(33)) {
                std::printf("frame %lld: found %d, HC %.1f mm, %.0f ms old\n", static_cast<long long>(reading->seq),
                            reading->found, reading->hc_mm, reading->age_ms);
                for (const auto &label : tinyusfm::measurements(*reading))
                    std::printf("  %s: %.0f px, confidence %.2f\n", label.label, label.area_px, label.confidence);
            }
        }
        while (session.newest(500)) {
        }
        auto counters = session.counters();
        std::printf("%lld frames, %lld answered, %lld overtaken\n", static_cast<long long>(counters.received),
                    static_cast<long long>(counters.processed), static_cast<long long>(counters.overtaken));
    } catch (const tinyusfm::Error &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
