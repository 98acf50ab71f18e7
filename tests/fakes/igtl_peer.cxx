/* A peer in OpenIGTLink's own C++ library, for tests: the other side of our receiver and of our server.
 *
 *     igtl_peer serve ROWS COLUMNS COUNT        listens on any port, prints it, serves one client COUNT pictures
 *     igtl_peer take PORT COUNT                 prints device, size, spacing and the pixels of each picture as hex
 *
 * Pixel (r, c) of picture n is (7 r + 3 c + 11 n) mod 251, spacing 0.25 x 0.5 mm (column, row).
 */
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <unistd.h>

#include "igtlClientSocket.h"
#include "igtlImageMessage.h"
#include "igtlMessageHeader.h"
#include "igtlOSUtil.h"
#include "igtlServerSocket.h"
#include "igtlStatusMessage.h"

static int serve(int rows, int columns, int count) {
    igtl::ServerSocket::Pointer listener = igtl::ServerSocket::New();
    int port = 0;
    for (int tried = 20000 + getpid() % 20000; tried < 60000; tried += 7)
        if (listener->CreateServer(tried) == 0) {
            port = tried;
            break;
        }
    if (!port)
        return 1;
    std::printf("%d\n", port);
    std::fflush(stdout);
    igtl::ClientSocket::Pointer client = listener->WaitForConnection(20000);
    if (client.IsNull())
        return 1;
    for (int n = 0; n < count; n++) {
        igtl::StatusMessage::Pointer status = igtl::StatusMessage::New();
        status->SetDeviceName("cpp");
        status->SetCode(igtl::StatusMessage::STATUS_OK);
        status->SetStatusString("alive");
        status->Pack();
        client->Send(status->GetPackPointer(), status->GetPackSize());

        igtl::ImageMessage::Pointer image = igtl::ImageMessage::New();
        int size[3] = {columns, rows, 1}, offset[3] = {0, 0, 0};
        float spacing[3] = {0.25f, 0.5f, 1.0f};
        image->SetDimensions(size);
        image->SetSpacing(spacing);
        image->SetScalarType(igtl::ImageMessage::TYPE_UINT8);
        image->SetSubVolume(size, offset);
        image->SetDeviceName("cpp");
        image->AllocateScalars();
        igtl::Matrix4x4 matrix;
        igtl::IdentityMatrix(matrix);
        image->SetMatrix(matrix);
        igtl::TimeStamp::Pointer stamp = igtl::TimeStamp::New();
        stamp->SetTime((igtlUint32)(1700000000 + n), (igtlUint32)0);
        image->SetTimeStamp(stamp);
        unsigned char *pixels = (unsigned char *)image->GetScalarPointer();
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c++)
                pixels[r * columns + c] = (unsigned char)((7 * r + 3 * c + 11 * n) % 251);
        image->Pack();
        client->Send(image->GetPackPointer(), image->GetPackSize());
        igtl::Sleep(30);
    }
    igtl::Sleep(300);
    client->CloseSocket();
    return 0;
}

static int take(int port, int count) {
    igtl::ClientSocket::Pointer socket = igtl::ClientSocket::New();
    if (socket->ConnectToServer("127.0.0.1", port) != 0)
        return 1;
    while (count > 0) {
        igtl::MessageHeader::Pointer header = igtl::MessageHeader::New();
        header->InitPack();
        if (socket->Receive(header->GetPackPointer(), header->GetPackSize()) != header->GetPackSize())
            return 1;
        header->Unpack();
        if (std::strcmp(header->GetDeviceType(), "IMAGE") != 0) {
            socket->Skip(header->GetBodySizeToRead(), 0);
            continue;
        }
        igtl::ImageMessage::Pointer image = igtl::ImageMessage::New();
        image->SetMessageHeader(header);
        image->AllocatePack();
        socket->Receive(image->GetPackBodyPointer(), image->GetPackBodySize());
        if (!(image->Unpack(1) & igtl::MessageHeader::UNPACK_BODY)) {
            std::puts("CRC");
            return 1;
        }
        int size[3];
        float spacing[3];
        image->GetDimensions(size);
        image->GetSpacing(spacing);
        std::printf("%s %d %d %d %.6f %.6f ", image->GetDeviceName(), size[1], size[0], image->GetNumComponents(),
                    spacing[1], spacing[0]);
        const unsigned char *pixels = (const unsigned char *)image->GetScalarPointer();
        for (int i = 0; i < size[0] * size[1] * image->GetNumComponents(); i++)
            std::printf("%02x", pixels[i]);
        std::printf("\n");
        count--;
    }
    std::fflush(stdout);
    socket->CloseSocket();
    return 0;
}

int main(int count, char **words) {
    if (count == 5 && !std::strcmp(words[1], "serve"))
        return serve(std::atoi(words[2]), std::atoi(words[3]), std::atoi(words[4]));
    if (count == 4 && !std::strcmp(words[1], "take"))
        return take(std::atoi(words[2]), std::atoi(words[3]));
    std::fprintf(stderr, "usage: igtl_peer serve ROWS COLUMNS COUNT | take PORT COUNT\n");
    return 2;
}
